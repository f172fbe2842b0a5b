import csv
import importlib
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import HERE

import evaluate
from train import command

SCRIPTS = sorted(path.stem for path in (HERE.parent / "experiments").glob("*.py") if "\nmain = script(" in path.read_text() or "\ndef main(argv)" in path.read_text())


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("edm_churn", "--quick ...") -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.syspath_prepend(str(HERE.parent / "experiments"))
    monkeypatch.chdir(tmp_path)

    def run(name, line):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(line)])
        try:
            command(importlib.import_module(name).main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_experiment_explains_itself_and_refuses_what_it_does_not_know(run, tmp_path, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and "--" in out and out.count("\n") >= 3
    code, out, err = run(name, "--nonsense 3")
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape, word", [("widt=3", "widt"), ("width=0", "--width"), ("mults=2", "len"), ("width", "unpack"), ("mults=1,1,1,1,1,1,1", "--size"), ("attention=9,", "--attention")])
def test_a_shape_that_cannot_be_is_refused_by_name(run, tmp_path, shape, word):
    code, _, err = run("unet_shapes", f"--shapes '{shape}'")
    assert code == 2 and err.startswith(f"error: shape '{shape}'") and word in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_experiment_trains_measures_and_writes_its_table_grid_and_row(run, tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(dim=[2, 3])
    torch.jit.script(Mean()).save("mean.pt")
    np.save("set.npy", np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8))
    line = "--flags='--width 8 --mults 1 --attention 0 --batch 4 --T 20 --lr 0.1 --warmup 0' --data set.npy --size 8 --steps 2 --n 8 --chain 2 --features mean.pt --device cpu"
    code, out, err = run("precision", line)
    assert code == 0, err
    rows = list(csv.DictReader(open("runs/precision/precision.csv")))
    assert [row["precision"] for row in rows] == ["fp32", "bf16", "fp32, another seed"]
    assert float(rows[0]["frechet"]) > 0 and float(rows[0]["spread"]) > 0 and float(rows[0]["rmse_1"]) != float(rows[2]["rmse_1"])
    assert len(list(csv.DictReader(open("runs/precision/losses.csv")))) == 6 and (tmp_path / "runs/precision/precision-grid.png").exists()
    assert (tmp_path / "runs/precision/precision.png").exists() or "no precision.png: matplotlib is not installed" in out      # errors by noise level
    row = out.strip().splitlines()[-1]
    assert row.startswith("| bf16 costs nothing") and row.count("|") == 7 and "precision.py --flags" in row
    assert run("precision", line.replace("--steps 2", "--steps 3"))[2].startswith("error: ")            # the runs that are there are others


@pytest.mark.parametrize("name, line, made", [
    ("ddpm_loss", "--steps 1 --bound_n 1 --n 2", "ddpm_loss-set-16.csv ddpm_loss-set-16-grid.png"),
    ("iddpm_schedule", "--steps 1 --T 30 --n 2", "table2-set-16.csv fig2-set-16.csv fig1.csv fig3.png fig5.csv"),
    ("iddpm_steps", "--train_steps 1 --n 2", "iddpm_steps.csv iddpm_steps-grid.png"),
    ("edm_samplers", "--train_steps 1 --n 2", "edm_samplers.csv edm_samplers-grid.png"),
    ("edm_churn", "--train_steps 1 --n 20 --images 2", "mixture.csv churn.csv churn-grid.png"),
    ("edm_training", "--steps 1 --n 2", "edm_training-set-16.csv edm_training-set-16-grid.png"),
    ("pdm_patches", "--steps 1 --n 2 --patches 2 4 --chain 2 --batch 2 --repeats 1", "pdm_patches-set-16.csv pdm_patches-set-16-grid.png"),
    ("pdm_targets", "--steps 1 --n 2 --patches 4 --chain 2", "pdm_targets-set-16-linear.csv pdm_targets-set-16-linear-grid.png"),
    ("patch_diffusion_p", "--steps 1 --n 2 --small 10 --batch 2", "patch_diffusion_p-set-16.csv patch_diffusion_p-set-16-grid.png")])
def test_each_claim_comes_out_with_one_command_without_classes(run, tmp_path, monkeypatch, name, line, made):
    monkeypatch.syspath_prepend(str(HERE.parent / "experiments"))
    common, script = importlib.import_module("common"), importlib.import_module(name)
    monkeypatch.setattr(script, "three_levels", lambda size: "--width 8 --mults 1 --attention 0", raising=False)
    def drawn(sampler, shape, seeds, *_):                                  # sampling has tests of its own: here what is made of it
        return torch.stack([torch.full(shape, i / 9) for _, i in seeds])
    monkeypatch.setattr(common, "draw", drawn)
    if name == "ddpm_loss":
        monkeypatch.setattr(script, "sample", lambda *_, **__: None)
        monkeypatch.setattr(script, "evaluate", lambda path, options, **what: evaluate.evaluate(path, dict(steps=10), **what))
    monkeypatch.setitem(common.train.DEFAULTS, "patch_diffusion", dict(width=8, mults=(1, 1, 1), attention=(0,)))
    monkeypatch.setattr(script, "peak", lambda *_: 1.0, raising=False)
    monkeypatch.setattr(common, "errors", lambda *_: [dict(sigma=1.0, held_out=0.5)])
    monkeypatch.setattr(common.train, "preview", lambda averaged, shape, classes, grid, rows: torch.zeros(grid, *shape))
    np.save("set.npy", np.random.default_rng(0).integers(0, 256, (70, 3, 16, 16), np.uint8))
    code, out, err = run(name, f"--quick --data set.npy {line} --out it --device cpu")
    assert code == 0, err
    assert all((tmp_path / "it" / file).stat().st_size for file in made.split())
    assert name == "iddpm_schedule" or "no Frechet distance: set.npy has no classes" in out
    assert out.strip().splitlines()[-1].count("|") == 7


def test_an_interrupted_experiment_goes_on_and_another_one_is_refused(run, tmp_path):
    run("features", "--help")
    from common import run_once
    import train
    np.save("set.npy", np.zeros((40, 3, 8, 8), np.uint8))
    flags = "--method pdm --patch 1 --size 8 --width 8 --mults 1 --batch 2 --T 10"
    path = run_once(tmp_path / "a", flags, "set.npy", 2, "cpu")
    (tmp_path / "a" / "flags.txt").write_text((tmp_path / "a" / "flags.txt").read_text().replace("--steps 2 --every 2", "--steps 4 --every 4"))
    assert run_once(tmp_path / "a", flags, "set.npy", 4, "cpu") == path and train.read(path)["step"] == 4
    before = path.stat().st_mtime_ns
    assert run_once(tmp_path / "a", flags, "set.npy", 4, "cpu") == path and path.stat().st_mtime_ns == before     # not trained twice
    with pytest.raises(ValueError, match="another run: --steps 4"):
        run_once(tmp_path / "a", flags + " --seed 3", "set.npy", 4, "cpu")


def test_without_a_features_file_one_is_trained_on_the_classes_and_found_again(run, capsys):
    run("features", "--help")
    from common import features_file
    np.savez("set.npz", images=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8), labels=np.arange(60) % 3)
    np.save("bare.npy", np.zeros((60, 8, 8, 3), np.uint8))
    path = features_file(None, "set.npz", [3, 8, 8], "cpu")
    assert path == "runs/features/set-8.pt" and torch.jit.load(path)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 64)
    capsys.readouterr()
    assert features_file(None, "set.npz", [3, 8, 8], "cpu") == path and not capsys.readouterr().out          # not trained twice
    assert features_file("none", "set.npz", [3, 8, 8], "cpu") is None
    assert features_file(None, "bare.npy", [3, 8, 8], "cpu") is None and "no classes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nowhere.pt"):
        features_file("nowhere.pt", "set.npz", [3, 8, 8], "cpu")


@pytest.mark.parametrize("name", ["edm_samplers", "iddpm_steps"])
def test_a_features_file_that_is_not_there_is_noticed_before_anything_is_trained(run, tmp_path, name):
    code, _, err = run(name, "--quick --features nowhere.pt")
    assert code == 2 and err.startswith("error: no such file: nowhere.pt") and not list(tmp_path.iterdir())
