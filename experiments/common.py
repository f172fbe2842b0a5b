"""What the experiments share: train with flags and measure, draw with several seeds and measure, write tables, plots and a row that says what came out."""
import datetime
import functools
import platform
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
import features as classifier
import train
from edm import denoiser
from evaluate import Features, errors, frechet_distance, load_like, moments, table
from sample import Cost, draw
from train import evenly, hold_out, load


def check(features):
    if features not in (None, "none") and not Path(features).is_file():
        raise ValueError(f"no such file: {features}; leave --features out and one is trained")


def features_file(name, data, shape, device):
    """The features file `name`; without a name runs/features/<data>-<size>.pt, trained on the data's classes if it is not there; None for "none" and where there are no classes."""
    check(name)
    if name is not None:
        return name if name != "none" else None
    C, H, W = shape
    path = Path(f"runs/features/{Path(data).stem}-{H}{f'x{W}' if W != H else ''}{'-gray' if C == 1 else ''}.pt")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            classifier.main(["--data", data, "--size", str(H), str(W), "--channels", str(C), "--out", str(path)] + (["--device", device] if device else []))
        except ValueError as error:
            return print(f"no Frechet distance: {error}")
    return str(path)


def three_levels(size):
    """Flags of the U-Net for images under 32x32, where the default's fourth level would be a grid of 3x3 or less."""
    return "--width 32 --mults 1 2 4 --attention 2" if size < 32 else ""


def run_once(run, flags, data, steps, device):
    """Train with these flags in folder `run`, go on where such a run was interrupted, or leave it if it is whole; the checkpoint's path. Raises ValueError if another one is there."""
    line, asked, path = [*f"--steps {steps} --every {min(steps, 5000)} --grid 16 {flags} --data".split(), data], run / "flags.txt", run / "ckpt.pt"
    before = asked.read_text() if asked.exists() else "of unknown flags"
    if path.exists() and before != " ".join(line):
        raise ValueError(f"{run} is another run: {before}; another --out, or delete it")
    if not path.exists() or train.read(path)["step"] < steps:
        run.mkdir(parents=True, exist_ok=True)
        asked.write_text(" ".join(line))
        train.main([*line, "--out", str(run)] + ["--resume"] * path.exists() + (["--device", device] if device else []))
    return path


def trained(run, flags, data, size, steps, n, chain, features, device):
    """What `run_once` trained: its errors by noise level with the Frechet distance of n samples of `chain`
    steps (mean and largest difference of three seeds), and the first seed's samples."""
    check(features)
    score = Score(run_once(run, f"--size {size} {flags}", data, steps, device), features, n, 3, device)
    checkpoint, method = score.checkpoint, score.method
    levels = errors(denoiser(method), (score.x[:5000], None), (pixels.to_float(score.held), None), 64, 0, score.device, run.with_name(f"{run.name}-error.csv"))
    row = {f"rmse_{level['sigma']:g}": round(level["held_out"], 5) for level in levels}
    distances, _, _, samples = score(method.sample, dict(steps=chain if checkpoint["method"] in ("edm", "patch_diffusion", "ddpm") else str(chain)))
    pixels.save_grid(samples[:64], run.with_name(f"{run.name}.png"))
    return row | spread(distances), samples


def spread(distances):
    return dict(frechet=round(statistics.mean(distances), 2), spread=round(max(distances) - min(distances), 2)) if distances else {}


class Score:
    """Frechet distance of what a sampler draws from one checkpoint, over several seeds of the noise, `batch` at a time (64, on CUDA 500); without features (see features_file) only the drawing, once."""

    def __init__(self, path, features, n, seeds, device, batch=None):
        if n < 2 or seeds < 1:
            raise ValueError(f"needs 2 images or more and 1 seed or more, got {n} and {seeds}")
        self.method, self.checkpoint = load(path, device=device)
        self.device, self.n = next(self.method.parameters()).device, n
        self.batch = batch or (500 if self.device.type == "cuda" else 64)
        source = self.checkpoint["config"]["data"]
        images, labels = load_like(self.checkpoint, source)
        (self.x, _), (held, _) = hold_out(images, labels, 0)
        trained_on = evenly(self.checkpoint["config"]["overfit"], len(images))
        self.held = held[~torch.isin(evenly(len(held), len(images)), trained_on)]
        if not len(self.held):
            raise ValueError(f"{path} was trained on every image that could measure it")
        features = features_file(features, source, self.checkpoint["shape"], device)
        self.seeds = seeds if features else 1
        self.network = Features(features, self.checkpoint["shape"], self.device) if features else None
        self.statistics = self.network.statistics(self.x, source, 256) if features else None
        if features:
            self.network.warn_of_few(n)

    def __call__(self, sampler, options):
        """(distances by seed, evaluations an image, seconds an image, the first seed's images)."""
        distances, labels = [], torch.arange(self.n) % len(self.checkpoint["classes"]) if self.checkpoint["classes"] else None
        with Cost(self.method, self.n * self.seeds) as cost:
            for seed in range(self.seeds):
                x = draw(functools.partial(sampler, **options), self.checkpoint["shape"], [(seed, i) for i in range(self.n)], self.batch, labels, self.device)
                if self.network:
                    distances.append(frechet_distance(*moments(self.network(pixels.to_uint8(x), 256)), *self.statistics))
                first = x if seed == 0 else first
        return distances, cost.seen / cost.n, cost.seconds / cost.n, first

    def table(self, cases, path, axis):
        """Score [(name, steps, sampler, options), ...], with another Score at the end of a case that is another network's; write a .csv, a .png against `axis` where matplotlib is, and a grid, a row a case; the table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, pictures = [], []
        for name, steps, sampler, options, *own in cases:
            distances, evaluations, seconds, x = (own[0] if own else self)(sampler, options)
            rows.append(dict(sampler=name, steps=steps, evaluations=round(evaluations)) | spread(distances) | dict(seconds=round(seconds, 3)))
            pictures.append(x)
            print(*rows[-1].values(), sep=" | ", flush=True)
        write(path, rows, f"{self.n} images, mean and largest difference of {self.seeds} seeds, {self.network.name if self.network else 'not measured'}, {self.device}", pictures)
        if self.network:
            plot(path.with_suffix(".png"), rows, axis, "frechet", "sampler", "spread")
        return rows


def write(name, rows, note, pictures=(), key=2):
    """Write a list of dicts as a .csv and print it. With `pictures`, images for each row: a grid that shows eight of each beside the row's first `key` entries, and a plot of the errors by noise level if the rows hold them."""
    table(name, rows)
    if len(pictures):
        labels = [" ".join(value if isinstance(value, str) else f"{column} {value}" for column, value in list(row.items())[:key])[:40] for row in rows]
        pixels.save_grid(torch.cat([x[:8].cpu() for x in pictures]), name.with_name(f"{name.stem}-grid.png"), 8, labels)
        curves = [dict(row=label, sigma=float(column[5:]), rmse=value) for label, row in zip(labels, rows) for column, value in row.items() if column.startswith("rmse_")]
        if curves:
            plot(name.with_suffix(".png"), curves, "sigma", "rmse", "row", log="xy")
    print(*rows[0], sep=" | ")
    for row in rows:
        print(*row.values(), sep=" | ")
    print(f"wrote {name}; {note}")


def claim(text, paper, ours):
    """Print what was found as a row of a table: claim, the paper's figure, ours, command, machine, date."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(": ")[1] for line in about.splitlines() if line.startswith("model name")), platform.processor() or platform.machine())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(f"| {text} | {paper} | {ours} | `{command}` | {where} | {datetime.date.today()} |")


def plot(path, rows, x, y, group, bar=None, log="x"):
    """Draw y against x, a line for each `group`, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print(f"no {path.name}: matplotlib is not installed; the figures are in the .csv")
    for k, name in enumerate(dict.fromkeys(row[group] for row in rows)):
        own = [row for row in rows if row[group] == name]
        plt.errorbar([row[x] for row in own], [row[y] for row in own], [row[bar] / 2 for row in own] if bar else None, label=name, color=f"C{k}",
                     marker="os^"[k // 10 % 3] if len(own) < 20 else None)
    plt.xscale("log" if "x" in log else "linear"), plt.yscale("log" if "y" in log else "linear"), plt.xlabel(x), plt.ylabel(y), plt.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()
