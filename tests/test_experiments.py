import csv
import importlib
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import HERE

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
