"""Where each equation stands, and which tests ask for it:   python course/index.py

Read from the files alone: the tags that end a paper file's lines, and the marks at the tests:

    @pytest.mark.equation("ddpm", "Eq. 4")       tags that the test asks for
    @pytest.mark.function("pdm", "patchify")     functions, where no tag or too many name them
"""
import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


def papers():
    """The names of the files whose first lines give a paper's arXiv number, as they build on
    one another; a sixth paper comes last.
    """
    five = ["ddpm", "iddpm", "pdm", "edm", "patch_diffusion"]
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("*.py"))}
    here = [name for name, text in texts.items() if "arXiv:" in text[:300]]
    return tuple([name for name in five if name in here] + sorted({*here} - {*five}))


PAPERS = papers()

# One equation: numbered, of another paper where its name stands before; PDM numbers none
NUMBERED = r"(?:[A-Z]+ )?(?:Eq\. \d+|Algorithm \d+|Table \d+|Sec\. \d[\d.]*|App\. [A-Z][\d.]*)"
NAMED = r"Training targets|Loss weight|Optimal prediction|SNR\(t\)"
ONE_TAG = re.compile(f"(?:{NUMBERED}|{NAMED})(?:, [^,;]+)?")
BETWEEN_TAGS = re.compile(f"[;,] (?={NUMBERED}|{NAMED})")
SHAPE = re.compile(r"\([^()]*,[^()]*\) ")


class Tag(NamedTuple):
    tag: str
    line: int
    function: str


class Mark(NamedTuple):
    test: str
    paper: str
    tag: str  # "" where the mark names a function
    function: str  # "" where the mark names a tag


def functions(file):
    """{qualified name: its node}: f, or Class.f; functions inside functions are left out."""
    found = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    found[f"{node.name}.{child.name}"] = child
    return found


def comments(file):
    """[(comment without its #, line)] of a file."""
    text = Path(file).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.string[1:].strip(), t.start[0]) for t in tokens if t.type == tokenize.COMMENT]


def tags(file):
    """[Tag] of a paper file from top to bottom; a comment may hold two, and a shape first."""
    spans = functions(file)
    found = []
    for comment, line in comments(file):
        parts = BETWEEN_TAGS.split(SHAPE.sub("", comment))
        if not all(ONE_TAG.fullmatch(part) for part in parts):
            continue
        for name, node in spans.items():
            if node.lineno <= line <= node.end_lineno:
                found += [Tag(part, line, name) for part in parts]
    return found


def marks(file):
    """[Mark] of the tests in a file, each test's from top to bottom."""
    found = []
    for test, node in functions(file).items():
        for decorator in node.decorator_list:
            kind = ast.unparse(decorator).partition("(")[0]
            if kind not in ("pytest.mark.equation", "pytest.mark.function"):
                continue
            paper, *names = [ast.literal_eval(argument) for argument in decorator.args]
            if kind == "pytest.mark.equation":
                found += [Mark(test, paper, name, "") for name in names]
            else:
                found += [Mark(test, paper, "", name) for name in names]
    return found


def find(file, name):
    """The qualified name of the function that is called so: Class.f, or f where one is."""
    names = list(functions(file))
    if name in names:
        return name
    ending = [other for other in names if other.endswith(f".{name}")]
    if len(ending) == 1:
        return ending[0]
    what = f"{len(ending)} functions are" if ending else "no function is"
    raise ValueError(
        f"{what} called {name} in {Path(file).name}: choose one of {', '.join(ending or names)}"
    )


def graded(paper):
    """{function: its tests}, those that name it, or ask for one of its tags and name none."""
    all_marks = marks(ROOT / "tests" / f"test_{paper}.py")
    of_paper = [mark for mark in all_marks if mark.paper == paper]
    naming = {mark.test for mark in of_paper if mark.function}
    with_tag = {}
    for tag in tags(ROOT / f"{paper}.py"):
        with_tag.setdefault(tag.tag, []).append(tag.function)
    tests = {name: {} for name in functions(ROOT / f"{paper}.py")}
    for mark in of_paper:
        names = [mark.function]
        if not mark.function:
            names = [] if mark.test in naming else with_tag.get(mark.tag, [])
        for name in names:
            if name in tests:
                tests[name][mark.test] = None
    return {name: list(of_name) for name, of_name in tests.items() if of_name}


def table():
    """The table of every tag, its function and the tests that are marked with it."""
    rows = ["| file | equation | function | tests |", "|---|---|---|---|"]
    marked = [mark for paper in PAPERS for mark in marks(ROOT / "tests" / f"test_{paper}.py")]
    for paper in PAPERS:
        once = dict.fromkeys((tag, function) for tag, _, function in tags(ROOT / f"{paper}.py"))
        for tag, function in once:
            tests = [m.test for m in marked if (m.paper, m.tag) == (paper, tag)]
            names = ", ".join(f"`{test}`" for test in dict.fromkeys(tests))
            rows.append(f"| {paper}.py | {tag} | `{function}` | {names} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
