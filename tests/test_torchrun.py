import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch

import evaluate
import sample
import train
from plumbing import contract, flags
from plumbing import device as devices

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
BLANK = 77  # exit code of a process that met a blank of the course's
SMALL = (
    "--width 8 --mults 1 --batch 8 --size 8 --grid 1 --device cpu "
    "--precision fp32 --data set.npz --steps 3 --every 3 --warmup 0 --clip_grad 0.1"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_set()


@pytest.fixture
def no_pictures(monkeypatch):
    tiny.draw_no_pictures(monkeypatch)


def in_torchrun(main, line, environment):
    """What one of torchrun's processes does; its exit code."""
    os.environ.update(environment)
    sys.argv = ["command", *line.split()]
    rank = environment["RANK"]
    sys.stdout = open(f"out{rank}", "w", buffering=1)
    sys.stderr = open(f"err{rank}", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)  # torch's own warnings
    torch.set_num_threads(1)
    try:
        flags.run(main)
    except SystemExit as stop:
        return stop.code or 0
    except NotImplementedError:
        return BLANK
    return 0


def run(main, line, processes=2):
    """Exit codes of the processes, each in the environment that torchrun gives it.

    They meet at a store of this process, as at torchrun's own: it takes a port that is free,
    and is there until the last of them has ended.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(
        TORCHELASTIC_RUN_ID="1",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
    )
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
                code = in_torchrun(main, line, shared | own)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if BLANK in codes:
        pytest.skip("waits for a function that is blank")
    return codes


def text(name):
    with open(name) as file:
        return file.read()


def read(run):
    return torch.load(f"{run}/ckpt.pt", weights_only=True)


def assert_equal_runs(a, b, atol):
    """The same weights within atol, and the same rows but for the times."""
    assert a["images"] == b["images"]
    assert a["sizes"] == b["sizes"]
    for key in ("model", "ema"):
        for name, weight in a[key].items():
            torch.testing.assert_close(b[key][name], weight, rtol=0, atol=atol)
    for row, other in zip(a["log"], b["log"], strict=True):
        for name in row.keys() - {"seconds", "images_per_s"}:
            assert other[name] == pytest.approx(row[name], abs=2e-5 + atol), name


TRAINED = [
    "--method ddpm --T 22 --attention 0 --conditional --flip --dropout 0.5",
    "--method iddpm --T 4 --attention",
    "--method pdm --attention --T 4 --patch 2 --split_snr 1",
    "--method edm --attention --augment 0.2",
    "--method patch_diffusion --attention",
]


@pytest.mark.parametrize("line", TRAINED)
def test_two_processes_train_what_accumulate_2_trains_on_one(line, no_pictures):
    train.main(f"{line} {SMALL} --accumulate 2 --out one".split())
    assert run(train.main, f"{line} {SMALL} --out two") == [0, 0], text("err0")
    assert_equal_runs(read("one"), read("two"), atol=1e-6)
    if "split" not in line:  # there torch warns of a step in which all parts had images
        assert "Warning" not in text("err0")


def test_parts_of_a_process_sum_to_its_batch(no_pictures):
    line = f"--method pdm --attention --T 4 --patch 2 {SMALL}"
    train.main(f"{line} --accumulate 4 --out one".split())
    assert run(train.main, f"{line} --accumulate 2 --out two") == [0, 0]
    assert_equal_runs(read("one"), read("two"), atol=1e-4)  # sums in another order


def test_with_objective_vlb_both_processes_keep_the_same_history(monkeypatch):
    held_out_error = train.held_out_error

    def remembering(method, *rest):
        torch.save(method.state_dict(), f"history{os.environ['RANK']}.pt")
        return held_out_error(method, *rest)

    monkeypatch.setattr(train, "held_out_error", remembering)
    line = f"--method iddpm --attention --objective vlb --T 4 {SMALL} --steps 8 --every 8"
    assert run(train.main, f"{line} --out two") == [0, 0], text("err0")
    histories = [torch.load(f"history{rank}.pt") for rank in (0, 1)]
    assert histories[0]["sampler.count"].sum() == 8 * 8
    for name in histories[0]:
        assert torch.equal(histories[0][name], histories[1][name]), name


def test_only_the_first_process_speaks_and_all_end_with_its_code():
    assert run(train.main, f"--method pdm --attention {SMALL} --batch 9 --out bad") == [2, 2]
    assert not os.path.exists("bad")
    assert "error: --accumulate 1 times 2 processes must divide --batch 9" in text("err0")
    assert text("err1") == text("out1") == ""


def test_one_gpu_is_not_given_to_two_processes():
    assert run(train.main, f"--method pdm --attention {SMALL} --device cuda:0") == [2, 2]
    assert text("err0") == "error: cuda:0 is one GPU for 2 processes: give --device cuda\n"


def test_more_processes_than_gpus_are_refused_by_all_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run(train.main, f"--method pdm --attention {SMALL} --device cuda") == [2, 2]
    assert text("err0") == "error: 2 processes for 1 GPUs: lower --nproc_per_node\n"


def test_images_lie_on_the_gpus_of_all_processes_or_of_none(monkeypatch):
    def room_on_the_first(device):
        return (10_000 if os.environ["RANK"] == "0" else 200, 10**6)

    def main(argv):
        devices.join()
        images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        fit = devices.images_fit(images, torch.device("cuda"))
        Path(f"fit{devices.rank()}").write_text(str(fit))

    monkeypatch.setattr(torch.cuda, "mem_get_info", room_on_the_first)
    assert run(main, "") == [0, 0]
    assert text("fit0") == text("fit1") == "False"


def test_a_stop_asked_of_one_process_stops_both_after_the_same_step(monkeypatch):
    def asked_of_the_second(asked):
        return any_of_all(os.environ["RANK"] == "1")

    any_of_all = train.any_of_all
    monkeypatch.setattr(train, "any_of_all", asked_of_the_second)
    line = f"--method pdm --attention --patch 2 --T 4 {SMALL} --out two"
    assert run(train.main, line) == [130, 130]
    assert read("two")["step"] == 1


@pytest.mark.parametrize("flag, expected", [("--split_snr 1", True), ("", False)])
def test_only_a_split_chain_leaves_weights_without_a_gradient(monkeypatch, flag, expected):
    answers = []
    dry_pass = contract.dry_pass

    def remembering(*arguments):
        answers.append(dry_pass(*arguments))
        return answers[0]

    monkeypatch.setattr(contract, "dry_pass", remembering)
    line = f"--method pdm --attention --patch 2 --T 4 {flag} {SMALL} --steps 1 --out one"
    train.main(line.split())
    assert answers == [expected]


# Drawing and measuring


def test_any_number_of_processes_draws_the_same_images():
    tiny.write_run(Path("run"), "ddpm")
    line = "run --n 5 --steps 4 --batch 2 --device cpu --out"
    sample.main(f"{line} one".split())
    assert run(sample.main, f"{line} three", processes=3) == [0, 0, 0]
    assert len(os.listdir("one")) == 5
    for name in os.listdir("one"):
        assert Path("one", name).read_bytes() == Path("three", name).read_bytes()
    assert "4 network evaluations" in text("out0")


def test_any_number_of_processes_measures_the_same():
    tiny.write_run(Path("run"), "ddpm")
    line = "run --nll --error --nearest --n 3 --steps 4 --device cpu --out"
    evaluate.main(f"{line} alone".split())
    assert run(evaluate.main, f"{line} together") == [0, 0]
    alone, together = (
        json.loads(Path(folder, "report.json").read_text())["step 3"]
        for folder in ("alone", "together")
    )
    for measure, name in (("nll", "bits_per_dim"), ("nearest", "samples"), ("nll", "nfe")):
        assert alone[measure][name] == pytest.approx(together[measure][name], rel=1e-5)
    for a, b in zip(alone["error"]["levels"], together["error"]["levels"]):
        assert a == pytest.approx(b, rel=1e-5)
