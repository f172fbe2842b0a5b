"""Chains as one page of HTML that needs nothing else: sample.py --html fills page.html."""
import html
import math
from pathlib import Path
from string import Template

from . import drawing, images
from .checkpoint import written_whole
from .flags import UserError
from .steps import as_html, numbers_of

FORM = Path(__file__).with_name("page.html")
FRAME = Template("""
<div class="frame" hidden>
<figure><figcaption>x</figcaption><div class="images">$x</div></figure>
<figure><figcaption>estimate of x<sub>0</sub></figcaption>
<div class="images">$estimate</div></figure>
<div><figure><figcaption>$level</figcaption>
<svg viewBox="0 -6 400 112" aria-hidden="true">
<polyline points="$points"/><circle r="5" $place/></svg></figure>
<div class="formula">$formula</div><table>$rows</table></div></div>""")


def most_frames(shape, n):
    """In how many frames n images (C, H, W) and their estimates make no page too large."""
    C, H, W = shape
    png = 4 / 3 * (min(C, 3) * H * W + H + 150)  # bytes in base64, if nothing is compressed
    most = min(drawing.MOST_FRAMES, int(3e6 / (2 * n * png)) - 1)
    if most < 8:
        raise UserError(f"a page of {n} images of {H}x{W} has over 3 MB: lower --n or --size")
    return most


def save(rows, runs, recorded, keys, path):
    """Write the page, whole or not at all: of each row its sampler and what it recorded."""
    sections = []
    for row, run, states in zip(rows, runs, recorded):
        numbers = numbers_of(row.method, run, max(states))
        frames = [frame(numbers, states, k, keys) for k in states]
        sections += ["<section><h2>", html.escape(row.name), "</h2>", *frames, "</section>"]
    parts = dict(sections="".join(sections), last=max(map(len, recorded)) - 1)
    parts["columns"] = math.ceil(math.sqrt(len(keys)))
    page = Template(FORM.read_text(encoding="utf-8")).substitute(parts)
    with written_whole(path) as file:
        file.write(page.encode("utf-8", "replace"))


def frame(numbers, states, k, keys):
    """State k of {k: (x, x_0_hat)} as HTML; x has at most the contrast of the sample."""
    x, x_0_hat = states[k]
    shown = list(states)
    sample, _ = states[shown[-1]]
    contrast = sample.std(dim=(1, 2, 3), keepdim=True).clamp(min=0.5)
    curve = numbers.curve - numbers.curve.min()
    down = 100 - 100 * curve / curve.max().clamp(min=1e-9)
    across = 400 / shown[-1]
    return FRAME.substitute(
        x=pictures("x", images.visible(x, contrast), keys),
        estimate=pictures("estimate of x_0", x_0_hat, keys),
        level=as_html(numbers.level),
        points=" ".join(f"{across * j:.1f},{down[j]:.1f}" for j in shown),
        place=f'cx="{across * k:.1f}" cy="{down[k]:.1f}"',
        formula=as_html(numbers.formula),
        rows="".join(table_row(words, column, k) for words, column in numbers.columns.items()),
    )


def pictures(what, x, keys):
    form = '<img src="{}" alt="{}, image {} of seed {}">'
    return "".join(form.format(images.as_uri(one), what, i, s) for one, (s, i) in zip(x, keys))


def table_row(words, column, k):
    number = f"{column[k]:.5g}" if k < len(column) else "&ndash;"
    return f"<tr><th>{as_html(words)}</th><td>{number}</td></tr>"
