import ast
import json
import re
import sys

import pytest
from conftest import HERE

sys.path.insert(0, str(HERE.parent / "experiments"))
import assignment
import index
import mutants

PAPERS = [f"{paper}.py" for paper in index.PAPERS]
COURSE = (HERE.parent / "COURSE.md").read_text()
GRADING = json.loads((HERE / "grading.json").read_text())


def names_of_tests(name):
    return set(re.findall(r"^def (test_\w+)", (HERE / f"test_{name}").read_text(), re.MULTILINE))


def test_the_index_names_every_tag_in_the_code_its_function_and_a_test_that_is_there():
    assert COURSE.endswith(index.index()), "python experiments/index.py prints the table that COURSE.md must end with"
    for paper, own in index.TESTS.items():
        assert set(own.values()) <= names_of_tests(f"{paper}.py")


def test_every_function_of_the_course_is_there_and_short_and_its_tests_grade_it():
    for name, part in zip(PAPERS, re.split(r"^### ", COURSE, flags=re.MULTILINE)[1:]):
        assert part.startswith(name)
        rows = [row.split("|") for row in part.split("\n## ")[0].splitlines() if row.startswith("| `")]
        assert len(rows) >= 4
        for row in rows:
            functions = re.findall(r"`([\w.]+)`", row[1])
            for function in functions:
                node = assignment.find((HERE.parent / name).read_text(), function)
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert body[-1].end_lineno - body[0].lineno < 15 or f"{body[-1].end_lineno - node.lineno + 1} lines" in row[1], function
            listed = set().union(*(GRADING[name][function] for function in functions))
            assert set(re.findall(r"`(test_\w+)`", row[3])) <= listed, functions


@pytest.mark.parametrize("name", PAPERS)
def test_a_blank_keeps_signature_and_docstring_and_every_other_line(name):
    source = (HERE.parent / name).read_text()
    for function, listed in GRADING[name].items():
        blank = assignment.blank(source, [function])
        before, after = (assignment.find(text, function) for text in (source, blank))
        assert ast.dump(before.args) == ast.dump(after.args) and ast.get_docstring(before) == ast.get_docstring(after)
        assert isinstance(after.body[-1], ast.Raise) and len(after.body) == 1 + bool(ast.get_docstring(before))
        assert [line for line in blank.splitlines() if "NotImplementedError" not in line] == \
            source.splitlines()[:before.body[bool(ast.get_docstring(before))].lineno - 1] + source.splitlines()[before.end_lineno:]
        assert listed and set(listed) <= names_of_tests(name)


def test_an_assignment_is_a_copy_that_lacks_the_body_and_the_history(tmp_path, capsys):
    assignment.assignment("pdm", "patchify", out=str(tmp_path / "copy"))
    copy = tmp_path / "copy"
    assert 'raise NotImplementedError("Fold P x P pixels' in (copy / "pdm.py").read_text() and "return nn.functional.pixel_shuffle" in (copy / "pdm.py").read_text()
    assert all((copy / name).read_text() == (HERE.parent / name).read_text() for name in ("ddpm.py", "train.py", "tests/test_pdm.py"))
    assert not (copy / ".git").exists() and "test_the_patch_round_trip_is_exact" in capsys.readouterr().out
    for words in (("pdm", "patchfy"), ("pdn", "patchify"), ("pdm",), ("edm", "loss2")):
        with pytest.raises(ValueError):
            assignment.assignment(*words, out=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="there already"):
        assignment.assignment("pdm", "patchify", out=str(copy))


def test_a_test_that_meets_another_papers_blank_waits_and_its_own_is_red(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "pdm.py").write_text(assignment.blank((HERE.parent / "pdm.py").read_text(), ["patchify"]))
    for name in ("ddpm.py", "iddpm.py"):
        (tmp_path / name).write_text((HERE.parent / name).read_text())
    for name in ("pdm", "data"):
        (tmp_path / f"tests/test_{name}.py").write_text(f"import torch\nfrom pdm import patchify\n\n\ndef test_{name}():\n    patchify(torch.zeros(1, 1, 2, 2), 2)\n")
    assert mutants.run_pytest(tmp_path, "tests") == {"test_pdm"}


def test_mutants_change_what_is_computed_and_nothing_else():
    source = 'def f(x: int, n=2):\n    """x + 1"""\n    if x < n:\n        raise ValueError(f"{x + 1}")\n    return (x + 1).sqrt()  # x - 1\n'
    changes = {change for _, _, change, _ in mutants.mutants(source)}
    assert changes == {"2 -> 3", "2 -> 1", "x < n -> x <= n", "x < n -> not x < n", "x + 1 -> x - 1", "x + 1 -> x", "1 -> 2", "1 -> 0", "(x + 1).sqrt() -> x + 1"}
    assert all(text in source for _, text, _, _ in mutants.mutants(source)) and all(text.endswith("# x - 1\n") for *_, text in mutants.mutants(source))
