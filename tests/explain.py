"""Comparisons that say, when they fail, what a student needs to know.

In this order: the fact in words (the test's name), what was expected and what came, the usual
mistake where COURSE.md knows one, and where to look: equation, function, file. Usage:

    close(came, expected, rtol=1e-9)         numbers that agree to a tolerance
    equal(came, expected)                    the same tensors, shapes, lists, names
    within(came, expected, standard_error)   a Monte Carlo estimate: five standard errors
    mean_within(samples, expected)           the same of a mean over the first dimension
    own_noise(eps)                           noise that no two pixels share
    holds(condition, "what is true", loss=loss)   anything else, with the numbers to print
"""
import contextvars
import re
import textwrap
from pathlib import Path

import pytest
import torch

from course import index

ROOT = Path(__file__).parent.parent
current_test = contextvars.ContextVar("the test that runs, as pytest's node", default=None)
FIRST_RED = pytest.StashKey()
NAMES_IN_CODE = (
    "x_0_hat", "x_0", "x_t", "alpha_bar", "beta_tilde", "q_sample", "c_noise", "p_t", "l_T",
    "l_simple", "l_hybrid", "l_vlb", "S_tmin", "S_tmax", "S_noise", "sigma_min", "sigma_max",
)


# Comparisons

def close(came, expected, rtol=1e-9, atol=0.0, what=""):
    __tracebackhide__ = True
    came = numbers(came)
    expected = numbers(expected)
    same_shape(came, expected, what)
    near = (came - expected).abs() <= atol + rtol * expected.abs()
    wrong = ~(near | (came == expected))
    if wrong.any():
        fail(what, show(expected), show(came), most_apart(came, expected, wrong))


def equal(came, expected, what=""):
    __tracebackhide__ = True
    if not (torch.is_tensor(came) and torch.is_tensor(expected)):
        if came != expected:
            fail(what, show(expected), show(came), first_difference(came, expected))
        return
    same_shape(came, expected, what)
    wrong = came != expected
    if wrong.any():
        fail(what, show(expected), show(came), most_apart(came, expected, wrong))


def within(came, expected, standard_error, what="", slack=0.0):
    """slack is what the method itself may be off, beside the chance."""
    __tracebackhide__ = True
    came, expected, error = torch.broadcast_tensors(
        numbers(came), numbers(expected), numbers(standard_error)
    )
    allowed = 5 * error + slack
    wrong = ~((came - expected).abs() < allowed)
    if wrong.any():
        largest = f"give or take {show(allowed.max())}, which is five standard errors"
        apart = most_apart(came, expected, wrong)
        fail(what, f"{show(expected)}\n{largest}", show(came), apart)


def mean_within(samples, expected, what="", slack=0.0):
    __tracebackhide__ = True
    samples = numbers(samples)
    standard_error = samples.std(0) / len(samples) ** 0.5
    within(samples.mean(0), expected, standard_error, what, slack)


def own_noise(eps):
    """The noise of images (B, C, H, W), C >= 2: each pixel of each image has one of its own."""
    __tracebackhide__ = True
    B, C, H, W = eps.shape
    within(eps.mean(0), 0, B**-0.5, what="the mean noise over the images")
    of_image = eps.flatten(1).mean(1)
    within(of_image, 0, (C * H * W) ** -0.5, what="the mean noise over an image's pixels")
    product = (eps[:, 0] * eps[:, 1]).mean()
    within(product, 0, (B * H * W) ** -0.5, what="the mean product of two channels")
    within(eps.square().mean(), 1, (2 / eps.numel()) ** 0.5, what="the mean square")


def holds(condition, words, **came):
    __tracebackhide__ = True
    if not condition:
        values = [f"{name} = {show(value)}" for name, value in came.items()]
        fail("", words, "\n".join(values) or "it is not so")


def same_shape(came, expected, what):
    __tracebackhide__ = True
    if came.shape != expected.shape:
        fail(what, f"shape {tuple(expected.shape)}", f"shape {tuple(came.shape)}")


# Numbers as words

def numbers(value):
    return torch.as_tensor(value, dtype=torch.float64).detach()


def show(value, digits=6, most=5):
    """A number, or the first few of many, in a line."""
    if torch.is_tensor(value) and not isinstance(value, torch.Size):
        value = value.detach().flatten().tolist() if value.ndim else value.item()
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        first = ", ".join(show(part, digits) for part in value[:most])
        more = f", ... ({len(value)} in all)" if len(value) > most else ""
        return f"{first}{more}" if len(value) == 1 and not more else f"({first}{more})"
    return str(value)[:200]


def most_apart(came, expected, wrong):
    """Where two tensors of one shape differ most, and in how many numbers."""
    if came.ndim == 0:
        return ""
    apart = (came.double() - expected.double()).abs().nan_to_num(torch.inf)
    place = tuple(i.item() for i in torch.unravel_index((apart * wrong).argmax(), apart.shape))
    pair = f"{show(expected[place], 10)} expected, {show(came[place], 10)} came"
    return f"at {list(place)}: {pair}; {wrong.sum()} of {wrong.numel()} numbers are wrong"


def first_difference(came, expected):
    """The first place where two lists differ, if they are long."""
    if not isinstance(came, list) or not isinstance(expected, list) or len(expected) < 4:
        return ""
    for k, (a, b) in enumerate(zip(came, expected)):
        if a != b:
            return f"first at [{k}]: {show(b)} expected, {show(a)} came"
    return f"{len(expected)} expected, {len(came)} came"


# The message

def fail(what, expected, came, apart=""):
    __tracebackhide__ = True
    node = current_test.get()
    lines = [] if node is None else fact(node)
    lines += block(f"Expected: {what}" if what else "Expected", expected)
    lines += block("Came", came)
    lines += block("Farthest apart", apart)
    if node is not None:
        functions, places = where(node)
        lines += block("Mend first, since this may follow from it", red_before(node))
        lines += block("Usual mistakes here", "\n".join(usual_mistakes(node, functions)))
        lines += block("Look at", "\n".join(places))
    raise AssertionError("\n".join(lines))


def block(title, text):
    """The title, and the text indented under it; nothing without a text."""
    if not text:
        return []
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 88)]
    return [title, *(f"    {line}" for line in lines)]


def fact(node):
    """The test's name as a sentence, and the parameters for which it is not so."""
    words = in_words(node.originalname)
    parameters = node.callspec.params if hasattr(node, "callspec") else {}
    plain = (int, float, str, list, tuple, dict, type(None))
    given = ", ".join(f"{k} = {v}" for k, v in parameters.items() if isinstance(v, plain))
    return block("It should be true that", f"{words}\nfor {given}" if given else words)


def in_words(name):
    """A test's name as a student reads it, names of the code as they are spelled there."""
    words = name.removeprefix("test_").replace("_", " ")
    words = re.sub(r" s\b", "'s", words).replace("authors", "authors'")
    for name in NAMES_IN_CODE:
        words = re.sub(rf"\b{name.replace('_', ' ')}\b", name, words)
    return words


def where(node):
    """(functions, lines): what the test's marks point to, as a reader finds it.

    A tag that a student has not written again leaves the functions that the marks name.
    """
    named = named_by(node, "function")
    tagged = named_by(node, "equation")
    functions = []
    lines = []
    for paper in dict.fromkeys([*named, *tagged]):
        at = index.functions(ROOT / f"{paper}.py")
        asked = tagged.get(paper, [])
        of_tags = [tag.function for tag in index.tags(ROOT / f"{paper}.py") if tag.tag in asked]
        shown = [name for name in named.get(paper, dict.fromkeys(of_tags)) if name in at]
        functions += [(paper, name) for name in shown]
        places = [f"{name} (line {at[name].lineno})" for name in shown]
        lines.append("; ".join([*together(asked), f"{paper}.py: " + ", ".join(places)]))
    return functions, lines


def together(tags):
    """["Algorithm 2, line 4", "Algorithm 2, line 6"] -> ["Algorithm 2, line 4, line 6"]."""
    parts = {}
    for tag in tags:
        head, *detail = tag.split(", ", 1)
        parts.setdefault(head, []).extend(detail)
    return [", ".join([head, *details]) for head, details in parts.items()]


def named_by(node, kind):
    """{paper: names} of a test's marks of this kind, from top to bottom."""
    names = {}
    for mark in reversed(list(node.iter_markers(kind))):
        paper, *of_paper = mark.args
        names.setdefault(paper, []).extend(of_paper)
    return names


def usual_mistakes(node, functions):
    """What COURSE.md says goes wrong in the functions that this test is the test of."""
    course = ROOT / "COURSE.md"
    if not course.exists():
        return []
    by_test = []
    by_function = []
    heading = ""
    for line in course.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            heading = line.removeprefix("### ").partition(".py")[0]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `") or len(cells) < 3:
            continue
        names = re.findall(r"`([^`]+)`", cells[0])
        said = f"in {', '.join(names)}: {cells[-1]}"
        if f"`{node.originalname}`" in line and heading == node.path.stem.removeprefix("test_"):
            by_test.append(said)
        for paper, name in functions:
            short = name.rpartition(".")[2]
            if heading == paper and (name in names or short in names):
                by_function.append(said)
    return list(dict.fromkeys(by_test or by_function))


def red_before(node):
    """The first red fact of the same file: what comes later may follow from it alone."""
    first = node.session.stash.setdefault(FIRST_RED, {})
    earlier = first.setdefault(node.path, node.originalname)
    if earlier == node.originalname:
        return ""
    return in_words(earlier)
