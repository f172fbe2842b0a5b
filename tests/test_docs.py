"""What the documents say: quotes of the code, tags of the papers, links and pictures."""
import re
import textwrap
from collections import Counter

import pytest
from explain import ROOT, equal, holds

from course import index

COMPANIONS = [name for name in index.PAPERS if (ROOT / f"docs/{name}.md").exists()]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "experiments", ROOT / "course")
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    .*$", re.MULTILINE)
INLINE = re.compile(r"`[^`]*`")
QUOTE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
TAKEN_BY_MARKDOWN = re.compile(r"\n\n|\\[,;:!{}|_]|<")
LINK = re.compile(r'(?:\]\(|src="|href=")([^)\s"]+)')
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)
CLAIMS = re.compile(r"^\| claim \|.*\n\|---.*\n((?:\|.*\n)+)", re.MULTILINE)


def companion(name):
    return (ROOT / f"docs/{name}.md").read_text()


def paper(name):
    return (ROOT / f"{name}.py").read_text()


def without_code(text):
    for code in (FENCED, INDENTED, INLINE):
        text = code.sub("", text)
    return text


def is_quote(block, source):
    """Whether the block is a run of lines of the source, indentation aside."""
    quoted = block.splitlines()
    lines = source.splitlines()
    for start, line in enumerate(lines):
        run = "\n".join(lines[start : start + len(quoted)])
        same_start = line.strip() == quoted[0].strip()
        if same_start and textwrap.dedent(run) == textwrap.dedent(block):
            return True
    return False


def count_words(text):
    """Words that are read as such: not code, formulas and the targets of links."""
    text = FORMULA.sub("", without_code(text))
    text = re.sub(r"\]\([^)]*\)", "] ", text)
    return len([word for word in text.split() if re.search(r"\w", word)])


def sections(text):
    """{heading: what stands below it, up to the next one}"""
    _, *parts = HEADING.split(without_code(text))
    return dict(zip(parts[::2], parts[1::2]))


def cells(row):
    return [cell.strip() for cell in row.split("|")]


def claims(page):
    """{claim: verdict} of the page's table of claims, without their links."""
    (table,) = CLAIMS.findall(page.read_text())
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", table)
    rows = [cells(row) for row in ROW.findall(words)]
    return {row[0]: row[1] for row in rows}


def anchors(text):
    """The anchors of a page's headings, by GitHub's rules."""
    before = Counter()
    known = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        words = re.sub(r"\]\([^)]*\)", "]", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        repeat = f"-{before[anchor]}" if before[anchor] else ""
        known.add(anchor + repeat)
        before[anchor] += 1
    return known


def is_broken(target, page):
    """Whether a link of the page leads to no file, or to no heading of another page."""
    if re.match(r"\w+:", target):
        return False
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
        return True
    return anchor != "" and file.suffix == ".md" and anchor not in anchors(file.read_text())


@pytest.mark.parametrize("name", COMPANIONS)
def test_each_quote_stands_letter_for_letter_in_the_paper_s_file(name):
    quotes = QUOTE.findall(companion(name))
    holds(len(quotes) > 0, "the companion quotes its file")
    source = paper(name)
    wrong = [quote for quote in quotes if not is_quote(quote, source)]
    equal(wrong, [], what=f"quotes that {name}.py does not hold")


@pytest.mark.parametrize("name", COMPANIONS)
def test_each_tag_of_a_paper_s_file_is_in_its_companion(name):
    text = companion(name)
    tags = dict.fromkeys(tag.tag for tag in index.tags(ROOT / f"{name}.py"))
    missing = [tag for tag in tags if not re.search(rf"(?<!\w){re.escape(tag)}(?!\w)", text)]
    equal(missing, [], what=f"tags of {name}.py that its companion lacks")


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_companion_has_800_to_1900_words(name):
    words = count_words(companion(name))
    holds(800 <= words <= 1900, "code and formulas aside it has 800 to 1900", count=words)


@pytest.mark.parametrize("name, most", [("README.md", 1600), ("COURSE.md", 1500)])
def test_a_page_that_is_read_whole_is_short(name, most):
    words = len((ROOT / name).read_text().split())
    holds(words <= most, f"code and tables included it has at most {most} words", count=words)


def test_no_cell_of_the_readme_is_longer_than_160_characters():
    rows = ROW.findall((ROOT / "README.md").read_text())
    holds(len(rows) > 0, "the README has tables")
    longest = max("|".join(rows).split("|"), key=len).strip()
    holds(len(longest) <= 160, "the longest cell has at most 160 characters", cell=longest)


def test_each_section_of_the_experiments_has_at_most_120_words_of_prose():
    text = (ROOT / "experiments/README.md").read_text()
    counts = {name: count_words(ROW.sub("", body)) for name, body in sections(text).items()}
    holds(len(counts) > 16, "a section for each claim", count=len(counts))
    long = {name: count for name, count in counts.items() if count > 120}
    equal(long, {}, what="sections of more than 120 words, tables and code aside")


def test_the_readme_tells_the_verdicts_of_the_experiments():
    verdicts = claims(ROOT / "experiments/README.md")
    holds(len(verdicts) > 0, "the experiments have a table of claims")
    equal(claims(ROOT / "README.md"), verdicts, what="verdict of each claim")


@pytest.mark.parametrize("name", COMPANIONS)
def test_formulas_hold_nothing_that_markdown_takes_for_its_own(name):
    formulas = FORMULA.findall(without_code(companion(name)))
    holds(len(formulas) > 0, "the companion has formulas")
    taken = [formula for formula in formulas if TAKEN_BY_MARKDOWN.search(formula)]
    equal(taken, [], what="formulas with a blank line, with \\, or \\{ or the like, or with <")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_and_each_picture_leads_somewhere(page):
    targets = LINK.findall(without_code(page.read_text()))
    broken = [target for target in targets if is_broken(target, page)]
    equal(broken, [], what="links that lead nowhere")


@pytest.mark.parametrize(
    "text, anchor",
    [
        ("# What --quick shows", "what---quick-shows"),
        ("## Eq. 5: L_T, and `t = 1`", "eq-5-l_t-and-t--1"),
        ("### The [U-Net](unet.py)'s shape", "the-u-nets-shape"),
        ("# Speed\n## Speed", "speed-1"),
    ],
)
def test_a_heading_has_github_s_anchor(text, anchor):
    holds(anchor in anchors(text), "the anchor is known", anchors=anchors(text))


def test_a_quote_keeps_the_order_and_the_indentation_of_its_lines():
    source = "def f(x):\n    if x:\n        y = 1\n    return y\n"
    assert is_quote("if x:\n    y = 1", source)
    assert is_quote("    return y", source)
    assert not is_quote("if x:\ny = 1", source)
    assert not is_quote("if x:\n    return y", source)
    assert not is_quote("y = 2", source)


def test_a_link_to_no_page_or_to_no_heading_is_broken():
    page = ROOT / "README.md"
    assert is_broken("docs/no_such_page.md", page)
    assert is_broken("README.md#no-such-heading", page)
    assert not is_broken("ddpm.py", page)
    assert not is_broken("https://arxiv.org", page)


def test_words_of_code_and_of_formulas_are_not_counted():
    parts = ["Two words, $x_t$ `code`", "    python train.py", "```python\nx = 1\n```"]
    equal(count_words("\n\n".join([*parts, "$$\nx = 1\n$$"])), 2, what="words")
