"""Tiny runs, written without training, and commands started in this process."""
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import train
from plumbing import checkpoint, flags, runs
from plumbing.flags import flags_of
from unet import UNet

SMALL = dict(width=8, mults=(1,), attention=(), data="set.npz", overfit=0)


def write_set(path="set.npz", count=60):
    """Random images of 8x8 with three classes."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 3, 8, 8), np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 3)


def write_run(folder, method, *, shape=(3, 8, 8), classes=0, latents=False, step=3, **config):
    """A run of the method whose weights, raw and averaged, are random but not all zero."""
    cls = checkpoint.METHODS[method]
    signatures = flags_of(cls) | flags_of(UNet)
    defaults = {name: parameter.default for name, parameter in signatures.items()}
    chain = dict(T=30) if "T" in defaults else {}
    about = dict(
        method=method,
        config=defaults | SMALL | chain | config,
        shape=list(shape),
        classes=[str(k) for k in range(classes)],
    )
    weights = {}
    for seed, name in enumerate(("model", "ema")):
        torch.manual_seed(seed)
        built = checkpoint.build(about)
        for weight in built.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        weights[name] = built.state_dict()
    empty = dict(optimizer={}, sizes={}, losses=[], log=[], seconds=0.0, fingerprint=0)
    counts = dict(step=step, images=8 * step, latents=latents)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder, about | weights | empty | counts)
    return folder / "ckpt.pt"


def draw_no_pictures(monkeypatch):
    """Those of a training run take much of its time where it is as short as here."""
    monkeypatch.setattr(train, "preview", nothing)
    monkeypatch.setattr(runs, "save_pictures", nothing)


def nothing(*_):
    return None


class Command:
    """command(module, line) -> (exit code, stdout, stderr), in this process."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, module, line):
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *line.split()])
        code = 0
        try:
            flags.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = self.capsys.readouterr()
        return code, out, err

    def refuses(self, module, line, words):
        """Assert that the line is refused, and that nothing is written."""
        before = sorted(Path().rglob("*"))
        assert_one_line(self(module, line), words)
        assert sorted(Path().rglob("*")) == before


def beside(runs, tmp_path, monkeypatch, capsys):
    """A Command in a folder of its own, beside copies of these runs."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def assert_one_line(result, words):
    """Assert that a Command was refused in one line with these words."""
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert words in err
