"""Make an assignment:   python course/assignment.py pdm patchify posterior_mean --out week2

Copies the project without its history and without what quotes the solutions, takes the bodies
of these functions out of the paper's file, and tells which of its tests are red until they are
written again. Signatures, docstrings and the numbers of the equations stay.
"""
import argparse
import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from course import index, trial

ROOT = Path(__file__).parent.parent
SECONDS = 300  # for the tests of the copy
FOR_STAFF = [
    "course/assignment.py",
    "course/equivalent.py",
    "course/grade.py",
    "course/mutants.py",
    "course/trial.py",
    "tests/test_course.py",
    "tests/test_docs.py",
]


def handed_out(root=ROOT):
    """The project's files that students get."""
    companions = [f"docs/{paper}.md" for paper in index.PAPERS]
    files = trial.project_files(root, tracked=True)
    kept = [file for file in files if file.as_posix() not in [*FOR_STAFF, *companions]]
    return [file for file in kept if not file.parts[0].startswith(".git")]


def blank(file, names):
    """The text of a paper's file without the bodies of these functions."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    nodes = index.functions(file)
    tags = index.tags(file)
    for name in sorted(names, key=lambda name: nodes[name].lineno, reverse=True):
        node = nodes[name]
        of_name = list(dict.fromkeys(tag.tag for tag in tags if tag.function == name))
        first = node.body[0].lineno
        if ast.get_docstring(node) is not None:
            first = node.body[0].end_lineno + 1
        lines[first - 1 : node.end_lineno] = body_to_write(node, of_name)
    return "\n".join(lines) + "\n"


def body_to_write(node, tags):
    """The lines that stand in the place of a body: its tags, and an error that names them."""
    indent = " " * node.body[0].col_offset
    equations = list(dict.fromkeys(tag.partition(",")[0] for tag in tags))
    message = f"{node.name} is to be written"
    if equations:
        message = f"{', '.join(equations)}: {message}"
    return [
        *(f"{indent}# {tag}" for tag in tags),
        f'{indent}raise NotImplementedError("{message}")',
    ]


def assignment(paper, names, out, root=ROOT):
    """Write the copy into the new folder `out`. ValueError for a mistake in the arguments."""
    file = root / f"{paper}.py"
    if not file.exists():
        raise ValueError(f"no paper {paper}: choose one of {', '.join(index.PAPERS)}")
    functions = [index.find(file, name) for name in names]
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out")
    files = handed_out(root)
    if Path(file.name) not in files:
        raise ValueError(f"git does not track {file.name}: git add it first")
    trial.copy_files(files, out, root)
    (out / file.name).write_text(blank(file, functions), encoding="utf-8")
    return functions


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", help=", ".join(index.PAPERS))
    parser.add_argument("functions", nargs="+", help="f or Class.f; the class may go")
    parser.add_argument("--out", help="the new folder [assignment-<paper>]")
    options = parser.parse_args(argv)
    paper = options.paper.removesuffix(".py")
    out = Path(options.out or f"assignment-{paper}")
    functions = assignment(paper, options.functions, out)
    print(f"wrote {out}: {', '.join(functions)} of {paper}.py to be written")
    result = trial.run_tests(out, paper, SECONDS)
    print(f"{len(result.failed)} tests are red until then, {len(result.passed)} are green:")
    for test in result.failed:
        print(f"    {test}")
    print(f"students:  cd {out} && python -m pytest -x --tb=short tests/test_{paper}.py")
    print(f"grade:     python course/grade.py {paper} --student {out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
