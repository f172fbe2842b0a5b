import json
import os
import socket
import sys

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from train import command

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked here, which Windows cannot")
BLANK = 77  # exit code of a process that met a blank of the course's
SMALL = "--width 8 --mults 1 --attention 0 --batch 8 --every 12 --grid 1 --device cpu --precision fp32 --data set.npz --steps 12"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", images=np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), np.uint8), labels=np.arange(60) % 3)


def run(module, line, processes=2):
    """Exit codes of the processes, each in the environment that torchrun gives it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                sys.argv, sys.stdout, sys.stderr = [module.__name__, *line.split()], *[open(f"{name}{rank}", "w", buffering=1) for name in ("out", "err")]
                torch.set_num_threads(1)
                command(module.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except NotImplementedError:
                code = BLANK
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if BLANK in codes:
        pytest.skip("waits for a function that is blank")
    return codes


def one(module, line):
    sys.argv = [module.__name__, *line.split()]
    command(module.main)


def read(name):
    return torch.load(name, weights_only=True)


@pytest.mark.parametrize("flags", ["--method iddpm --objective vlb --T 4 --conditional --flip", "--method patch_diffusion --accumulate 2",
                                   "--method pdm --patch 2 --split_snr 0.25 --T 30"])
def test_two_processes_train_the_model_that_one_trains_on_the_same_batch(flags):
    one(train, f"{flags} {SMALL} --out one")
    assert run(train, f"{flags} {SMALL} --out two") == [0, 0]
    a, b = (read(f"{name}/ckpt.pt") for name in ("one", "two"))
    torch.manual_seed(0)
    start = train.build(a).state_dict()
    assert b["step"] == 12 and b["images"] == a["images"] and torch.equal(a["rng"][0], b["rng"][0]) and a["sizes"] == b["sizes"]
    for key in ("model", "ema"):
        moved, apart = (sum((x[k] - a[key][k]).double().square().sum() for k in a[key] if "net" in k).sqrt() for x in (start, b[key]))
        assert apart < 0.01 * moved, f"{key} moved by {moved:.3g} in training, and the two runs end {apart:.3g} apart"
    rows = [open(f"{name}/log.csv").read().split() for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 2 and [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]]


def test_dropout_differs_between_processes_and_leaves_their_other_draws_alike():
    assert run(train, f"--method ddpm --T 30 {SMALL} --steps 3 --dropout 0.5 --out two") == [0, 0]
    one(train, f"--method ddpm --T 30 {SMALL} --steps 3 --dropout 0.5 --out one")
    a, b = read("one/ckpt.pt"), read("two/ckpt.pt")
    assert not torch.equal(a["rng"][0], b["rng"][0])             # one process drew its dropout from the stream of the noise
    one(train, f"--method ddpm --T 30 {SMALL} --steps 3 --out without")
    assert torch.equal(read("without/ckpt.pt")["rng"][0], b["rng"][0])


def test_a_run_goes_on_with_another_number_of_processes():
    one(train, f"--method pdm --patch 2 --T 30 {SMALL} --steps 6 --out parts")
    assert run(train, "--method pdm --out parts --resume --steps 12") == [0, 0]
    one(train, f"--method pdm --patch 2 --T 30 {SMALL} --out whole")
    a, b = read("parts/ckpt.pt"), read("whole/ckpt.pt")
    assert torch.equal(a["rng"][0], b["rng"][0]) and all((a["ema"][k] - b["ema"][k]).abs().max() < 1e-3 for k in a["ema"])


def test_any_number_of_processes_draws_and_measures_the_same():
    one(train, f"--method ddpm --T 30 {SMALL} --steps 2 --out run")
    one(sample, "run/ckpt.pt --n 5 --steps 4 --batch 2 --out one")
    assert run(sample, "run/ckpt.pt --n 5 --steps 4 --batch 2 --out three", processes=3) == [0, 0, 0]
    assert sorted(os.listdir("one")) == sorted(os.listdir("three")) and len(os.listdir("one")) == 5
    assert all(open(f"one/{name}", "rb").read() == open(f"three/{name}", "rb").read() for name in os.listdir("one"))
    measure = "run/ckpt.pt --nll --error --nearest --n 3 --steps 4 --device cpu --out"
    one(evaluate, f"{measure} alone")
    assert run(evaluate, f"{measure} together") == [0, 0]
    a, b = (json.load(open(f"{name}/report.json")) for name in ("alone", "together"))
    assert a["nll"]["bits_per_dim"] == pytest.approx(b["nll"]["bits_per_dim"], rel=1e-6) and a["nearest"] == pytest.approx(b["nearest"], rel=1e-5)
    assert [row["floor"] for row in a["error"]["levels"]] == pytest.approx([row["floor"] for row in b["error"]["levels"]], rel=1e-6)


def test_only_the_first_process_speaks_and_all_end_with_its_code():
    assert run(train, f"--method pdm {SMALL} --batch 9 --out bad") == [2, 2] and not os.path.exists("bad")
    assert "error: --accumulate 1 times 2 processes must divide --batch 9" in open("err0").read() and open("err1").read() == open("out1").read() == ""
