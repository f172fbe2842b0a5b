"""Grade a student's file:   python course/grade.py pdm --student handed-in

Puts the student's pdm.py, alone, into a copy of this project, runs our own tests of the paper,
and prints a score for each function: how many of the tests that mark it pass, and what the
first red one says. The student's code runs with your rights: use a container where you would
not run it yourself.
"""
import argparse
import ast
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from course import index, trial

ROOT = Path(__file__).parent.parent
TITLES = ("It should be true that", "Expected", "Came", "Mend first", "Usual mistakes")
AS_HANDED_OUT = "as handed out: this follows from another function"


def file_of(student, paper):
    """The student's file of a paper, in a folder or named itself."""
    file = Path(student)
    if file.is_dir():
        file = file / f"{paper}.py"
    if not file.is_file():
        raise ValueError(f"no {file}")
    return file


def try_out(file, paper, seconds):
    """The Trial of our tests on the student's file."""
    with tempfile.TemporaryDirectory() as folder:
        trial.copy_files(trial.project_files(), folder)
        copy = Path(folder) / f"{paper}.py"
        copy.write_bytes(file.read_bytes())
        return trial.run_tests(folder, paper, seconds)


def problem_of(file):
    """What keeps Python from reading a file, in a line; "" for nothing."""
    try:
        ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        return f"does not import: {error}"
    return ""


def unchanged(file, paper):
    """The names of the functions that are, but for comments, those of our own file."""
    ours = index.functions(ROOT / f"{paper}.py")
    theirs = index.functions(file)
    same = [name for name in ours if name in theirs]
    return [name for name in same if ast.dump(ours[name]) == ast.dump(theirs[name])]


# The score

def grade(student, paper, seconds):
    """Print the score of a paper."""
    if paper not in index.PAPERS:
        raise ValueError(f"no paper {paper}: choose one of {', '.join(index.PAPERS)}")
    file = file_of(student, paper)
    print(f"{file}")
    problem = problem_of(file)
    if problem:
        print(f"    {problem}\ntotal: 0 tests")
        return
    result = try_out(file, paper, seconds)
    if result.problem:
        print(f"    {result.problem}; tests that were not reached count as red")
    if result.printed:
        print("    prints while it is tested")
    tests = index.graded(paper)
    whole = [name for name in tests if set(tests[name]) <= set(result.passed)]
    same = unchanged(file, paper)
    for name, of_name in tests.items():
        lines = [] if name in whole else what_is_wrong(of_name, result)
        if name in same and lines:
            lines = [AS_HANDED_OUT]
        print_row(paper, name, of_name, result.passed, lines)
    every = [name for name in index.functions(tests_of(paper)) if name.startswith("test_")]
    passed = len(result.passed)
    print(f"total: {len(whole)} of {len(tests)} functions, {passed} of {len(every)} tests")


def tests_of(paper):
    return ROOT / "tests" / f"test_{paper}.py"


def print_row(paper, name, tests, passed, lines):
    tags = [tag.tag for tag in index.tags(ROOT / f"{paper}.py") if tag.function == name]
    equations = ", ".join(dict.fromkeys(tag.partition(",")[0] for tag in tags))
    right = sum(test in passed for test in tests)
    verdict = "ok" if right == len(tests) else "red"
    print(f"{name:30} {equations[:36]:36} {right:3}/{len(tests):<3} {verdict}")
    for line in lines:
        print(f"    {line}")


def what_is_wrong(tests, result):
    """The key lines of the first message among these tests' own."""
    messages = [result.failed[test] for test in tests if test in result.failed]
    return key_lines(messages[0]) if messages else ["not reached"]


def key_lines(message):
    """The blocks of a message that say what is wrong, a line each; else its first line."""
    blocks = []
    for line in message.splitlines():
        if line.startswith("    ") and blocks:
            blocks[-1].append(line.strip())
        else:
            blocks.append([line.removeprefix("AssertionError: ").strip() + ":"])
    told = [" ".join(block) for block in blocks if block[0].startswith(TITLES)]
    return told or [message.partition("\n")[0]]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("papers", nargs="+", help=", ".join(index.PAPERS))
    parser.add_argument("--student", default=ROOT, help="a folder, or a file [this project]")
    parser.add_argument("--seconds", type=float, default=120, help="for a paper's tests")
    options = parser.parse_args(argv)
    for paper in options.papers:
        grade(options.student, paper.removesuffix(".py"), options.seconds)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
