"""Frechet distance and error by noise level of checkpoints, beside their training data."""
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import sample
from edm import denoiser
from experiments.common import check_features, train_each
from experiments.report import curves_of, plot, save_rows, write
from experiments.tools import features as classifier
from experiments.verdict import decide
from plumbing import checkpoint, images
from plumbing.datasets import evenly, hold_out, load_like
from plumbing.drawing import counted
from plumbing.flags import UserError
from plumbing.frechet import Features, frechet_distance, moments

FEATURES_BATCH = 256
LEVEL = "rmse_1"  # the error that decides beside the distance


class Drawn(NamedTuple):
    """What a sampler drew, from one network or several."""

    images: torch.Tensor  # (n, C, H, W) in [-1, 1], of the first
    distances: list  # one for each network, or seed of the noise; empty where none is measured
    evaluations: float  # of the network, for each image
    seconds: float  # for each image

    @property
    def frechet(self):
        return round(statistics.mean(self.distances), 2) if self.distances else None

    def columns(self):
        """The mean distance and the largest difference, for a table."""
        if not self.distances:
            return {}
        spread = max(self.distances) - min(self.distances)
        return dict(frechet=self.frechet, spread=round(spread, 2))


class Result(NamedTuple):
    """What became of the trainings of a case."""

    paths: list  # of their checkpoints
    errors: dict  # {"rmse_<sigma>": [error on held-out images, one for each training]}
    drawn: Drawn

    def columns(self):
        """Means over the trainings, for a table."""
        means = {name: statistics.mean(values) for name, values in self.errors.items()}
        return {name: round(mean, 5) for name, mean in means.items()} | self.drawn.columns()


class Judge:
    """Draws from a checkpoint and compares with its data; without features it only draws."""

    def __init__(self, path, features, n, seed=0, batch=None, device=None, like=None):
        """like: a judge of the same data, whose images and features are taken."""
        self.method, self.saved = checkpoint.load(path, device=device)
        self.device = next(self.method.parameters()).device
        self.n = n
        self.seed = seed  # of the noise
        self.batch = batch or (500 if self.device.type == "cuda" else 64)
        self.labels = None
        if self.saved["classes"]:
            self.labels = torch.arange(n) % len(self.saved["classes"])
        if like is None:
            self.look_at_data(path, features)
        else:
            self.learned = like.learned
            self.held_out = like.held_out
            self.network = like.network
            self.known = like.known

    def look_at_data(self, path, features):
        """The images learned and held out; the features, and their statistics of all images."""
        source = self.saved["config"]["data"]
        x, self.learned, self.held_out = data_of(path, self.saved, source)
        features = features_file(features, source, self.saved["shape"], self.device.type)
        self.network = None
        self.known = None
        if features:
            self.network = Features(features, self.saved["shape"], self.device)
            self.known = self.network.statistics(x, source, FEATURES_BATCH)
            if self.n <= self.network.dimensions:
                few = f"{self.n} images are few for {self.network.dimensions} features"
                print(f"warning: {few}")

    def chain(self, sampler="own", **options):
        """A sampler of sample.py under these options; no more steps than the method has."""
        if "steps" in options and sampler == "own":
            options["steps"] = min(options["steps"], getattr(self.method, "T", 10**6))
        return sample.chain(self.method, sampler, options, self.saved["shape"])

    def draw(self, run):
        """The Drawn of a sampler run(noise, y, randn_like=...)."""
        keys = [(self.seed, i) for i in range(self.n)]
        with counted(self.method, self.n) as cost:
            shape = self.saved["shape"]
            x = sample.draw(run, shape, keys, self.batch, self.labels, self.device)
        distances = [self.distance(x)] if self.network else []
        return Drawn(x, distances, cost.nfe, cost.seconds_per_image)

    def distance(self, x):
        vectors = self.network(images.to_uint8(x), FEATURES_BATCH)
        return frechet_distance(*moments(vectors), *self.known)

    def errors(self, path):
        """{"rmse_<sigma>": error on held-out images}; more of it in a .csv."""
        few = evenly(5000, len(self.learned.x))  # of every class, where these come one by one
        learned = self.learned._replace(x=self.learned.x[few])
        D = denoiser(self.method)
        rows = evaluate.errors(D, learned, self.held_out, 64, 0, self.device)
        evaluate.write_table(path, rows)
        return {f"rmse_{row['sigma']:g}": row["held_out"] for row in rows}

    def words(self):
        """What was measured, for a note under a table."""
        name = self.network.name if self.network else "not measured"
        return f"{self.n} images, mean and largest difference, {name}, {self.device}"


def judges_of(setup, path, name, flags, batch=None):
    """A Judge for each training of a case; of a checkpoint that is given, for each noise."""
    paths = [path] * setup.seeds if path is not None else train_each(setup, name, flags)
    return judges_for(setup, paths, batch)


def judges_for(setup, paths, batch=None):
    """A Judge for each checkpoint, with a noise of its own; all are of the same data."""
    judges = []
    for seed, path in enumerate(paths):
        like = judges[0] if judges else None
        judge = Judge(path, setup.features, setup.n, seed, batch, setup.device, like)
        judges.append(judge)
    return judges


def joined(drawn):
    """The Drawn of several networks as one."""
    distances = [distance for one in drawn for distance in one.distances]
    seconds = statistics.mean(one.seconds for one in drawn)
    return drawn[0]._replace(distances=distances, seconds=seconds)


def data_of(path, saved, source):
    """Images but those held out, Data trained on, Data held out from all and from --overfit."""
    x, labels = load_like(saved, source)
    (others, _), (held_out, _) = hold_out(x, labels, 0)
    overfit = saved["config"]["overfit"]
    (learned, _), _ = hold_out(x, labels, overfit)
    few = evenly(overfit, len(x))
    held_out = held_out[~torch.isin(evenly(len(held_out), len(x)), few)]
    if not len(held_out):
        raise UserError(f"{path} was trained on every image that could measure it")
    learned = evaluate.Data(learned, None, source, f"images of {source}")
    held_out = evaluate.Data(held_out, None, source, f"held-out images of {source}")
    return others, learned, held_out


def features_file(name, data, shape, device):
    """The features file `name`; without one it is trained on the data's classes, once.

    None for "none", and where there are no classes.
    """
    check_features(name)
    if name is not None:
        return name if name != "none" else None
    channels, height, width = shape
    size = f"{height}" if height == width else f"{height}x{width}"
    gray = "-gray" if channels == 1 else ""
    path = Path(f"runs/features/{Path(data).stem}-{size}{gray}.pt")
    if path.is_file():
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = ["--size", str(height), str(width)]
    where = [] if device is None else ["--device", device]
    kind = ["--channels", str(channels), *where]
    try:
        classifier.main(["--data", data, *sides, *kind, "--out", str(path)])
    except UserError as error:
        print(f"no Frechet distance: {error}")
        return None
    return str(path)


def measure(setup, name, flags, steps):
    """Train a case from several seeds; the Result, of its own sampler in so many steps."""
    paths = train_each(setup, name, flags)
    drawn = []
    errors = {}
    for judge in judges_for(setup, paths):
        table = setup.out / f"{name}-seed{judge.seed}-error.csv"
        for level, error in judge.errors(table).items():
            errors.setdefault(level, []).append(error)
        drawn.append(judge.draw(judge.chain(steps=steps)))
    images.save_grid(drawn[0].images[:64], setup.out / f"{name}.png")
    return Result(paths, errors, joined(drawn))


def verdict(ours, other, repeats="trainings"):
    """Whether the Result `ours` has lower distances and lower errors than `other`, in words."""
    drawn = decide(ours.drawn.distances, other.drawn.distances, repeats=repeats)
    errors = decide(ours.errors[LEVEL], other.errors[LEVEL], repeats=repeats)
    return f"{drawn}; by {LEVEL} {errors}"


# Several samplers


class Case(NamedTuple):
    """A sampler to compare with others."""

    name: str
    steps: int
    runs: list  # run(noise, y, randn_like=...) yields (x, x_0_hat); one for each judge
    judges: list


def case_of(judges, name, steps, sampler, **options):
    """A Case of a sampler of sample.py."""
    return Case(name, steps, [j.chain(sampler, steps=steps, **options) for j in judges], judges)


def compare(cases, path, axis):
    """{(name, steps): Drawn}; a table, a grid, and a plot against the column `axis`."""
    found = {}
    rows = []
    for case in cases:
        drawn = joined([judge.draw(run) for judge, run in zip(case.judges, case.runs)])
        row = dict(sampler=case.name, steps=case.steps, evaluations=round(drawn.evaluations))
        rows.append(row | drawn.columns() | dict(seconds=round(drawn.seconds, 3)))
        found[case.name, case.steps] = drawn
        print(*rows[-1].values(), sep=" | ", flush=True)
    write(path, rows, cases[0].judges[0].words())
    labels = [f"{case.name} steps {case.steps}"[:40] for case in cases]
    save_rows(path, labels, [drawn.images for drawn in found.values()])
    if "frechet" in rows[0]:
        curves = curves_of(rows, "sampler", axis, "frechet", "spread")
        plot(path.with_suffix(".png"), curves, axis, "Frechet distance")
    return found
