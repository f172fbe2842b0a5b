"""What an experiment leaves: tables, grids, plots, and a row that says what came out."""
import csv
import datetime
import platform
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from evaluate import write_table
from plumbing import images
from plumbing.drawing import make_folder

SHOWN = 8  # images of each row of a grid


def write(path, rows, note):
    """Write a list of dicts as a .csv, and print it."""
    make_folder(path.parent)
    write_table(path, rows)
    print(*rows[0], sep=" | ")
    for row in rows:
        print(*row.values(), sep=" | ")
    print(f"wrote {path}; {note}")


def mean_and_spread(name, values):
    """Two columns of a table: the mean of the trainings, and their largest difference."""
    spread = max(values) - min(values)
    return {name: round(statistics.mean(values), 3), "spread": round(spread, 3)}


def read_table(path):
    """The rows of a .csv, as dicts of words."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_rows(path, labels, pictures):
    """Beside the table `path`, a grid that shows eight images of each row next to its label."""
    shown = torch.cat([x[:SHOWN].cpu() for x in pictures])
    columns = min(SHOWN, len(pictures[0]))
    images.save_grid(shown, path.with_name(f"{path.stem}-grid.png"), columns, labels)


def write_results(path, rows, results, note):
    """Table, grid and plot of several runs' Results; rows: what tells the runs apart."""
    write(path, [row | result.columns() for row, result in zip(rows, results)], note)
    labels = [label_of(row) for row in rows]
    save_rows(path, labels, [result.drawn.images for result in results])
    curves = []
    for label, result in zip(labels, results):
        levels = [float(name.removeprefix("rmse_")) for name in result.errors]
        means = [statistics.mean(values) for values in result.errors.values()]
        curves.append(Curve(label, levels, means))
    plot(path.with_suffix(".png"), curves, "sigma", "rmse", log="xy")


def label_of(row):
    """P 4 x sqrt_snr: a row's words, and its numbers with the names of their columns."""
    words = [v if isinstance(v, str) else f"{column} {v}" for column, v in row.items()]
    return " ".join(words)[:40]


# Plots


class Curve(NamedTuple):
    name: str
    x: list
    y: list
    bars: list | None = None  # heights of error bars


def curves_of(rows, group, x, y, bar=None):
    """A Curve for each value of the column `group`; x, y and bar name columns too."""
    curves = []
    for name in dict.fromkeys(row[group] for row in rows):
        of_group = [row for row in rows if row[group] == name]
        bars = [row[bar] / 2 for row in of_group] if bar else None
        values = [row[y] for row in of_group]
        curves.append(Curve(name, [row[x] for row in of_group], values, bars))
    return curves


def plot(path, curves, x, y, log="x"):
    """Draw curves, where matplotlib is installed; log: the axes that are logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed; the figures are in the .csv")
        return
    figure = Figure()
    axes = figure.subplots()
    for k, curve in enumerate(curves):
        marker = "os^"[k // 10 % 3] if len(curve.x) < 20 else None
        options = dict(label=curve.name, color=f"C{k}", marker=marker)
        axes.errorbar(curve.x, curve.y, curve.bars, **options)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


# The row


def claim(text, paper, ours, verdict):
    """Print a row: claim, the paper's figure, ours, verdict, command, machine, date."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    today = datetime.date.today()
    found = f"{text} | {paper} | {ours} | {verdict}"
    print(f"| {found} | `{command}` | {machine()} | {today} |")


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor():
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor() or platform.machine()
