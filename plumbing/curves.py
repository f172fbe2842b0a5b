"""What one watches while a run goes on: its curves, and its samples so far."""
import itertools
import math
import re

from PIL import Image, ImageDraw, ImageFont

from . import images
from .flags import UserError

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f")
WIDTH, HEIGHT = 480, 360  # of a panel
MARGIN = 56


def save_curves(rows, path):
    """Write the loss, and the held-out errors, against the images seen, as one picture.

    rows: those of log.csv. Both axes are logarithmic. UserError where it cannot be written.
    """
    seen = [row["images"] for row in rows]
    errors = [name for name in rows[-1] if name.startswith("rmse_")]
    picture = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    draw_panel(picture, 0, "loss", seen, {"loss": [row.get("loss", 0) for row in rows]})
    curves = {name: [row.get(name, 0) for row in rows] for name in errors}
    draw_panel(picture, WIDTH, "error on held-out images at these noise levels", seen, curves)
    images.save(picture, path)


def draw_panel(picture, left, title, x, curves):
    """Draw {name: values} over x in the panel that begins at column `left`."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    low_x, high_x = log_range(x)
    low_y, high_y = log_range(list(itertools.chain(*curves.values())))

    def place(x, y):
        right = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        across = left + MARGIN + right * (WIDTH - 2 * MARGIN)
        return across, HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    frame = [place(10**low_x, 10**high_y), place(10**high_x, 10**low_y)]
    draw.rectangle(frame, outline="#888888")
    draw.text((left + MARGIN, MARGIN / 2), title, "black", font)
    for edge, anchor in ((low_x, "la"), (high_x, "ra")):
        corner = place(10**edge, 10**low_y)
        draw.text((corner[0], corner[1] + 6), f"{10**edge:,.0f} images", "black", font, anchor)
    for edge in (low_y, high_y):
        corner = place(10**low_x, 10**edge)
        draw.text((corner[0] - 6, corner[1]), f"{10**edge:.3g}", "black", font, anchor="rm")
    for colour, (name, curve) in zip(COLOURS, curves.items()):
        points = [place(a, b) for a, b in zip(x, curve) if is_shown(a) and is_shown(b)]
        if not points:
            continue
        draw.line(points, colour, width=2)
        across, down = points[-1]
        draw.ellipse((across - 2, down - 2, across + 2, down + 2), colour)
        if len(curves) > 1:
            sigma = name.removeprefix("rmse_")
            draw.text((across + 6, down), sigma, colour, font, anchor="lm")


def is_shown(value):
    """Whether a logarithmic axis can show it."""
    return 1e-30 < value < 1e30


def log_range(values):
    """The decimal logarithms of the least and the largest value shown, never equal."""
    shown = [value for value in values if is_shown(value)] or [1.0]
    low = math.log10(min(shown))
    high = math.log10(max(shown))
    return (low, high) if high - low > 1e-3 else (low - 0.1, high + 0.1)


def save_progress(folder, rows, path):
    """Write the first row of each grid 000500.png in a folder, one below the other.

    All begin at the same noise. rows: how many rows a grid has.
    """
    names = sorted(p for p in folder.iterdir() if re.fullmatch(r"\d{6,}\.png", p.name))
    strips = []
    for name in names:
        try:
            grid = images.open_image(name)
        except UserError:  # a picture that was damaged is no reason to stop a run
            continue
        height = (grid.height - images.GAP) // rows
        strips.append((int(name.stem), grid.crop((0, 0, grid.width, height))))
    strips = [strip for strip in strips if strip[1].size == strips[-1][1].size]
    _, last = strips[-1]
    picture = Image.new("RGB", (MARGIN + last.width, len(strips) * last.height + images.GAP))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for k, (step, strip) in enumerate(strips):
        picture.paste(strip, (MARGIN, k * last.height))
        draw.text((6, (k + 0.5) * last.height), f"{step}", "white", font, anchor="lm")
    images.save(picture, path)
