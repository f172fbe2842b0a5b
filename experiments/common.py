"""What the experiments share: checks before any work, and runs that are trained only once."""
import shlex
from pathlib import Path
from typing import NamedTuple

import train
from plumbing import checkpoint
from plumbing.drawing import check_range, make_folder
from plumbing.flags import UserError

MOST = 10**7  # of anything that is counted
TWO_LEVELS = "--mults 1 2 --attention"  # a grid of patches may be 2x2


class Setup(NamedTuple):
    """What all runs of an experiment have in common."""

    out: Path  # folder of the runs and tables
    data: str  # as in train.py
    size: int  # of the images
    steps: int  # training steps of each run
    n: int  # samples that are measured
    features: str | None  # TorchScript file, "none", or None: one is trained
    device: str | None
    flags: str = ""  # more of train.py's, for every run
    seeds: int = 3  # trainings of each case, or draws of a given checkpoint

    @property
    def stem(self):
        return f"{Path(self.data).stem}-{self.size}"


def choose(value, quick, short, full):
    """The value that the user gave, or the default of a short run or of a full one."""
    if value is not None:
        return value
    return short if quick else full


# Before any work


def check_counts(least, **counts):
    """UserError for the first count, or tuple of counts, below `least` or beyond reason.

    None, which stands for a default, passes.
    """
    for name, counted in counts.items():
        values = counted if isinstance(counted, tuple) else (counted,)
        for value in values:
            if value is not None:
                check_range(name, value, least, MOST)


def check_features(features):
    """UserError for a features file that is not there."""
    if features not in (None, "none") and not Path(features).is_file():
        raise UserError(f"no such file: {features}; leave --features out and one is trained")


def prepare(setup, **counts):
    """UserError for what would fail after training: numbers, features, a folder to write in."""
    check_counts(1, **counts, size=setup.size, steps=setup.steps, seeds=setup.seeds)
    check_counts(2, n=setup.n)
    if "--seed" in setup.flags.replace("=", " ").split():
        raise UserError("--flags takes no --seed: each training has its own, by --seeds")
    check_features(setup.features)
    make_folder(setup.out)


# Runs


def three_levels(size):
    """Flags of the U-Net for images under 32x32.

    The default's fourth level would be a grid of 3x3 or less.
    """
    return "--width 32 --mults 1 2 4 --attention 2" if size < 32 else ""


def train_each(setup, name, flags):
    """`train_once` from several seeds; the checkpoints."""
    seeds = range(setup.seeds)
    return [train_once(setup, f"{name}-seed{k}", f"{flags} --seed {k}") for k in seeds]


def train_once(setup, name, flags):
    """Train with these flags in the folder `name`, unless such a run is there; its checkpoint.

    A run that was interrupted goes on. UserError where another run is there.
    """
    run = setup.out / name
    path = run / "ckpt.pt"
    about = run / "flags.txt"
    every = min(setup.steps, 5000)
    line = f"--steps {setup.steps} --batch 32 --every {every} --grid 16 --size {setup.size}"
    words = [*shlex.split(f"{line} {flags} {setup.flags}"), "--data", setup.data]
    if setup.device is not None:
        words += ["--device", setup.device]
    asked = shlex.join(words)
    if path.exists():
        before = about.read_text(encoding="utf-8") if about.exists() else "of unknown flags"
        if before != asked:
            raise UserError(f"{run} is another run: {before}; another --out, or delete it")
        if checkpoint.read(path)["step"] >= setup.steps:
            return path
        words.append("--resume")
    make_folder(run)
    about.write_text(asked, encoding="utf-8")
    train.main([*words, "--out", str(run)])
    return path
