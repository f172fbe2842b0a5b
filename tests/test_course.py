"""What teachers run: assignments, grades, mutants, and the tables of COURSE.md."""
import ast
import functools
import json
import os
import re
import subprocess
import sys
import types

import conftest
import pytest
from explain import ROOT, equal, holds

from course import assignment, equivalent, grade, index, mutants, trial

COURSE = (ROOT / "COURSE.md").read_text(encoding="utf-8")
graded = functools.cache(index.graded)
functions = functools.cache(index.functions)
SIXTH = '''"""A line through the images.  Nobody, 2024.  arXiv:2401.00001"""


class Line:
    def at(self, t):
        """Where the line is at t; Eq. 1."""
        return 2 * t + 1                                                # Eq. 1

    def rise(self, t, s):
        """How far it rises from s to t; Eq. 2."""
        return self.at(t) - self.at(s)                                  # Eq. 2
'''
ITS_TESTS = '''import pytest
from explain import equal
from line import Line


@pytest.mark.equation("line", "Eq. 1")
def test_the_line_begins_at_1():
    equal(Line().at(0), 1)


@pytest.mark.equation("line", "Eq. 2")
def test_the_line_rises_by_2_each_step():
    equal(Line().rise(3, 1), 4)
'''


# COURSE.md

def tables():
    """[(paper, the names in the row's first cell, the whole cell)] of COURSE.md's tables."""
    rows = []
    for part in re.split(r"^### ", COURSE, flags=re.MULTILINE)[1:]:
        paper = part.partition(".py")[0]
        for line in re.findall(r"^\| (`.*)", part.partition("\n## ")[0], re.MULTILINE):
            cell = line.partition(" | ")[0]
            rows.append((paper, re.findall(r"`([\w.]+)`", cell), cell))
    return rows


def test_every_paper_has_functions_worth_assigning():
    equal(list(dict.fromkeys(paper for paper, *_ in tables())), list(index.PAPERS))


@pytest.mark.parametrize("paper, names, cell", tables())
def test_a_function_worth_assigning_is_short_and_graded(paper, names, cell):
    for name in names:
        function = index.find(ROOT / f"{paper}.py", name)
        node = functions(ROOT / f"{paper}.py")[function]
        lines = node.end_lineno - node.body[0].end_lineno
        short = lines <= 20 or "lines" in cell
        holds(short, "it has 20 lines at most, or COURSE.md says how many", lines=lines)
        known = list(graded(paper))
        holds(function in known, f"tests are marked with {function}", graded=known)


def test_every_assignment_in_the_text_can_be_made():
    commands = re.findall(r"course/assignment\.py (\w+) ([\w. ]+)", COURSE)
    holds(len(commands) >= 4, "the text has an assignment of each kind", commands=commands)
    for paper, names in commands:
        for name in names.partition(" --")[0].split():
            index.find(ROOT / f"{paper}.py", name)


# Assignments

@pytest.mark.parametrize("paper", index.PAPERS)
def test_a_blank_keeps_signature_docstring_tags_and_every_other_line(paper, tmp_path):
    file = ROOT / f"{paper}.py"
    copy = tmp_path / file.name
    names = list(graded(paper))
    copy.write_text(assignment.blank(file, names), encoding="utf-8")
    ours = index.functions(file)
    blank = index.functions(copy)
    equal(list(blank), list(ours), what="functions")
    for name in names:
        equal(ast.dump(blank[name].args), ast.dump(ours[name].args), what=f"{name}'s arguments")
        equal(ast.get_docstring(blank[name]), ast.get_docstring(ours[name]), what="docstring")
        holds(isinstance(blank[name].body[-1], ast.Raise), "the body is an error", name=name)
    equal(tags_of(copy), tags_of(file), what="tags by function")
    equal(rest(copy, names), rest(file, names), what="the other lines")


def tags_of(file):
    return list(dict.fromkeys((tag.tag, tag.function) for tag in index.tags(file)))


def rest(file, names):
    """The lines outside the bodies of these functions."""
    lines = file.read_text(encoding="utf-8").splitlines()
    for name, node in reversed(index.functions(file).items()):
        if name in names:
            del lines[node.lineno - 1 : node.end_lineno]
    return lines


def test_several_functions_are_blank_at_once_and_the_error_names_their_equations():
    text = assignment.blank(ROOT / "ddpm.py", ["Chain.q_sample", "DDPM.loss"])
    raised = re.findall(r'raise NotImplementedError\("(.*)"\)', text)
    equal(raised, ["Eq. 4: q_sample is to be written",
                   "Algorithm 1, Eq. 14: loss is to be written"])


def test_students_get_the_papers_and_their_tests_but_nothing_that_quotes_a_solution():
    names = [file.as_posix() for file in assignment.handed_out()]
    needed = {"README.md", "ddpm.py", "course/index.py", "tests/test_ddpm.py", "COURSE.md"}
    equal(needed - {*names}, set(), what="files that students lack")
    secret = {"course/equivalent.py", "course/grade.py", "docs/ddpm.md", "tests/test_docs.py"}
    equal(secret & {*names}, set(), what="files that quote solutions")
    equal([name for name in names if name.startswith(".")], [], what="hidden files")


@pytest.mark.parametrize("paper, name, message", [
    ("pdn", "patchify", "no paper pdn: choose one of ddpm, iddpm"),
    ("pdm", "patchfy", "no function is called patchfy in pdm.py: choose one of patchify"),
    ("edm", "coefficients", "functions are called coefficients in edm.py: choose one of Col"),
    ("pdm", "patchify", "is there already: choose another --out"),
])
def test_an_assignment_that_cannot_be_made_is_refused(tmp_path, paper, name, message):
    with pytest.raises(ValueError, match=message):
        assignment.assignment(paper, [name], tmp_path)


@pytest.mark.parametrize("of, outcome", [
    ("test_train.py", pytest.skip.Exception), ("test_pdm.py", NotImplementedError),
])
def test_a_test_that_meets_another_papers_blank_waits_and_its_own_is_red(of, outcome):
    hook = conftest.pytest_runtest_call(types.SimpleNamespace(path=ROOT / "tests" / of))
    next(hook)
    blank = compile("raise NotImplementedError('Eq. 4')", str(ROOT / "pdm.py"), "exec")
    with pytest.raises(NotImplementedError) as met:
        exec(blank)
    with pytest.raises(outcome, match="Eq. 4"):
        hook.throw(met.value)


# A sixth paper, from its assignment to its mutants

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with a sixth paper, which is two files."""
    folder = tmp_path_factory.mktemp("copy")
    pictures = (".png", ".gif")
    files = [file for file in trial.project_files() if file.suffix not in pictures]
    trial.copy_files(files, folder)
    (folder / "line.py").write_text(SIXTH, encoding="utf-8")
    (folder / "tests/test_line.py").write_text(ITS_TESTS, encoding="utf-8")
    return folder


def printed(folder, line):
    """What a command of the copy prints."""
    done = subprocess.run(
        [sys.executable, *line.split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_a_sixth_paper_is_assigned_and_the_red_tests_are_listed(copy):
    out = printed(copy, "course/assignment.py line rise --out week")
    lines = out.splitlines()
    equal(lines[:3], ["wrote week: Line.rise of line.py to be written",
                      "1 tests are red until then, 1 are green:",
                      "    test_the_line_rises_by_2_each_step"])
    text = (copy / "week/line.py").read_text(encoding="utf-8")
    holds('NotImplementedError("Eq. 2: rise is' in text, "the body is blank", text=text)
    holds(not (copy / "week/course/grade.py").exists(), "graders stay with the staff")


def test_a_sixth_paper_is_graded_by_function_and_a_red_one_says_why(copy):
    wrong = SIXTH.replace("self.at(t) - self.at(s)", "print(t) or self.at(s) - self.at(t)")
    (copy / "student").mkdir()
    (copy / "student/line.py").write_text(wrong, encoding="utf-8")
    lines = printed(copy, "course/grade.py line --student student").splitlines()
    equal([line.strip() for line in lines[1:]], [
        "prints while it is tested",
        f"{'Line.at':30} {'Eq. 1':36}   1/1   ok",
        f"{'Line.rise':30} {'Eq. 2':36}   0/1   red",
        "It should be true that: the line rises by 2 each step",
        "Expected: 4",
        "Came: -4",
        "total: 1 of 2 functions, 1 of 2 tests",
    ])


def test_a_sixth_paper_s_mutants_are_tried_and_those_not_noticed_are_listed(copy):
    lines = printed(copy, "course/mutants.py line --sample 2").splitlines()
    results = (copy / "mutants.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in results]
    unnoticed = [result for result in results if result["noticed_by"] is None]
    equal(len(results), 2)
    equal(lines[0], "2 mutants, 2 to try")
    row = f"line.py | 2 | {2 - len(unnoticed)} | 0 | {len(unnoticed)}"
    holds(row in lines, f"it prints {row}", printed=lines)


def test_a_result_is_known_while_the_file_is_the_same_and_the_tests_if_unnoticed():
    result = dict(paper="pdm", version="1", which="1", tests="1", noticed_by=None)
    known = {mutants.key(result): result}
    holds(mutants.is_known(result, known), "the same mutant is known")
    holds(not mutants.is_known(result | dict(version="2"), known), "another file's is not")
    holds(not mutants.is_known(result | dict(tests="2"), known), "nor one for other tests")
    result["noticed_by"] = "test_a"
    holds(mutants.is_known(result | dict(tests="2"), known), "but one that was noticed is")


# Grading

def test_a_file_that_is_no_python_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "pdm.py").write_text("def patchify(x, P:\n")
    grade.grade(tmp_path, "pdm", seconds=1)
    _, problem, total = capsys.readouterr().out.splitlines()
    holds("does not import" in problem and "line 1" in problem, "it says where", line=problem)
    equal(total, "total: 0 tests")


@pytest.mark.parametrize("events, problem", [
    (["import", "end"], "does not import: a message"),
    (["start"], "Python itself came to an end, in test_a"),
    ([], "Python itself came to an end, while it was imported"),
    (["start", "passed", "end"], ""),
])
def test_what_ends_the_tests_is_told_in_one_line(tmp_path, events, problem):
    line = dict(test="test_a", message="a message", printed=False)
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps(line | dict(event=event)) for event in events))
    equal(trial.read(file).problem, problem)
    if problem.startswith("Python"):
        late = trial.read(file, "no end in 9 s").problem
        equal(late, problem.replace("Python itself came to an end", "no end in 9 s"))


def test_a_function_left_as_it_was_is_not_blamed(tmp_path):
    text = (ROOT / "pdm.py").read_text(encoding="utf-8")
    changed = text.replace("return pixel_unshuffle(x, P)", "return x  # wrong")
    (tmp_path / "pdm.py").write_text(changed, encoding="utf-8")
    same = grade.unchanged(tmp_path / "pdm.py", "pdm")
    equal({*index.functions(ROOT / "pdm.py")} - {*same}, {"patchify"})


def test_a_test_grades_the_functions_that_it_names_or_those_with_its_tags():
    tests = graded("ddpm")
    marks = index.marks(ROOT / "tests/test_ddpm.py")
    named = [mark.test for mark in marks if mark.function == "Chain.q_sample"]
    equal([test for test in named if test not in tests["Chain.q_sample"]], [])
    elsewhere = [name for name, of_name in tests.items() if named[0] in of_name]
    holds("DDPM.ddim" not in elsewhere, "a tag that ddim shares does not count", of=elsewhere)


# Mutants

def test_a_mutant_changes_what_is_computed_and_nothing_else():
    source = (
        'def f(x: int, n=2):\n    """x + 1"""\n    if x < n:\n'
        '        raise ValueError(f"{x + 1}")\n    return (x + 1).sqrt()  # x - 1\n'
    )
    planted = mutants.mutants(source)
    equal({mutant.change for mutant in planted}, {
        "2 -> 3", "2 -> 1", "x < n -> x <= n", "x < n -> not x < n", "x + 1 -> x - 1",
        "x + 1 -> x", "1 -> 2", "1 -> 0", "(x + 1).sqrt() -> x + 1",
    })
    for mutant in planted:
        holds(mutant.text in source, "the line is as in the file", line=mutant.text)
        holds(mutant.source.endswith("# x - 1\n"), "the comment stays", source=mutant.source)


@pytest.mark.parametrize("paper", equivalent.EQUIVALENT)
def test_every_line_of_the_equivalent_mutants_stands_in_its_paper(paper):
    text = (ROOT / f"{paper}.py").read_text(encoding="utf-8")
    lines = {line.split("  #")[0].strip() for line in text.splitlines()}
    rows = equivalent.EQUIVALENT[paper]
    equal([line for line, *_ in rows if line not in lines], [], what="lines that are not there")
