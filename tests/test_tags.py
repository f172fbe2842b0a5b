"""Tags in the papers' files and marks at the tests say the same, and messages lead to them."""
import functools
import re

import pytest
from explain import ROOT, close, current_test, equal, fail, holds

from course import index

FILES = {paper: ROOT / f"{paper}.py" for paper in index.PAPERS}
TESTS = {paper: ROOT / "tests" / f"test_{paper}.py" for paper in index.PAPERS}
LIKE_A_TAG = re.compile(r"(?i)\b(eq|alg|tab|sec|app)[a-z]*\.? *\(?[A-Z]?\d|\beqs\b")


@functools.cache
def asked():
    """{(paper, tag)} of all marks at the tests of papers."""
    marks = [mark for tests in TESTS.values() for mark in index.marks(tests)]
    return {(mark.paper, mark.tag) for mark in marks}


@pytest.mark.parametrize("paper", index.PAPERS)
def test_every_tag_is_asked_for_by_a_test(paper):
    unasked = [tag for tag in index.tags(FILES[paper]) if (paper, tag.tag) not in asked()]
    equal(unasked, [], what="tags without a test: @pytest.mark.equation(paper, tag) is missing")


@pytest.mark.parametrize("paper", [*index.PAPERS, "unet"])
def test_every_mark_names_a_tag_or_a_function_that_is_there(paper):
    marks = index.marks(ROOT / "tests" / f"test_{paper}.py")
    known = {}
    for other in {mark.paper for mark in marks}:
        file = ROOT / f"{other}.py"
        known[other] = {tag.tag for tag in index.tags(file)} | set(index.functions(file))
    wrong = [mark for mark in marks if (mark.tag or mark.function) not in known[mark.paper]]
    equal(wrong, [], what="marks with a tag or a function that is not in the paper's file")


@pytest.mark.parametrize("paper", [*index.PAPERS, "unet"])
def test_every_test_of_a_paper_says_where_its_subject_stands(paper):
    tests = ROOT / "tests" / f"test_{paper}.py"
    names = [name for name in index.functions(tests) if name.startswith("test_")]
    marked = {mark.test for mark in index.marks(tests)}
    equal([name for name in names if name not in marked], [], what="tests without a mark")


@pytest.mark.parametrize("paper", index.PAPERS)
def test_a_tag_stands_within_96_columns(paper):
    lines = FILES[paper].read_text(encoding="utf-8").splitlines()
    for tag in index.tags(FILES[paper]):
        columns = len(lines[tag.line - 1])
        holds(columns <= 96, f"{tag.tag} at line {tag.line} is within 96", columns=columns)


@pytest.mark.parametrize("paper", index.PAPERS)
def test_a_comment_of_equations_is_spelled_as_a_reader_searches_for_them(paper):
    tagged = {tag.line for tag in index.tags(FILES[paper])}
    nodes = index.functions(FILES[paper]).values()
    inside = {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}
    wrong = []
    for comment, line in index.comments(FILES[paper]):
        like_a_tag = LIKE_A_TAG.match(index.SHAPE.sub("", comment))
        if like_a_tag and line in inside and line not in tagged:
            wrong.append((line, comment))
    equal(wrong, [], what="comments that begin like a tag and are none")


@pytest.mark.parametrize("paper", index.PAPERS)
def test_no_text_of_a_paper_names_several_equations_at_once(paper):
    text = FILES[paper].read_text(encoding="utf-8")
    several = re.findall(r"(?:Eqs|Algs|Secs|Apps|Algorithms|Tables)\.? \(?[A-Z]?\d.*", text)
    equal(several, [], what="plural equations")


@pytest.mark.parametrize("comment, expected", [
    ("x = 1  # Eq. 4", ["Eq. 4"]),
    ("x = 1  # Eq. 1, Eq. 3", ["Eq. 1", "Eq. 3"]),
    ("x = 1  # Eq. 17; Sec. 3.2", ["Eq. 17", "Sec. 3.2"]),
    ("x = 1  # Algorithm 2, line 4", ["Algorithm 2, line 4"]),
    ("x = 1  # Eq. 5, L_{t-1}", ["Eq. 5, L_{t-1}"]),
    ("x = 1  # Table 1, VP c_in", ["Table 1, VP c_in"]),
    ("x = 1  # DDIM Eq. 12", ["DDIM Eq. 12"]),
    ("x = 1  # (T,) App. C.3", ["App. C.3"]),
    ("x = 1  # Training targets, v", ["Training targets, v"]),
    ("x = 1  # Eqs. 4 to 6", []),
    ("x = 1  # Eq. 4 and 5", []),
    ("x = 1  # the weight of Eq. 4", []),
    ("x = '# Eq. 4'", []),
])
def test_a_tag_is_a_comment_of_one_equation_or_several(tmp_path, comment, expected):
    file = tmp_path / "paper.py"
    file.write_text(f"class A:\n    def f(self):\n        {comment}\n")
    found = index.tags(file)
    equal([tag.tag for tag in found], expected)
    equal([tag[1:] for tag in found], [(3, "A.f")] * len(expected), what="line and function")


@pytest.mark.equation("ddpm", "Eq. 4")
@pytest.mark.function("ddpm", "Chain.q_sample")
def test_a_message_says_the_fact_the_numbers_the_usual_mistake_and_the_place():
    with pytest.raises(AssertionError) as red:
        close([1.0, 2.5], [1.0, 2.0], what="x_t")
    lines = str(red.value).splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    equal(titles, ["It should be true that", "Expected: x_t", "Came", "Farthest apart",
                   "Usual mistakes here", "Look at"])
    fact = "    a message says the fact the numbers the usual mistake and the place"
    holds(fact in lines, "the message says the fact", message=lines)
    holds("    (1, 2)" in lines, "the message says the numbers", message=lines)
    holds("alpha for alpha_bar" in str(red.value), "it says the usual mistake", message=lines)
    holds("Eq. 4; ddpm.py: Chain.q_sample" in lines[-1], "it says the place", message=lines)


def test_a_comparison_outside_a_test_says_the_numbers_alone():
    token = current_test.set(None)
    with pytest.raises(AssertionError) as red:
        fail("", "1", "nan")
    current_test.reset(token)
    equal(str(red.value).splitlines(), ["Expected", "    1", "Came", "    nan"])
