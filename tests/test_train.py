import csv
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image

import sample
import train
from train import METHODS, add_flags, build, command, flags_of, load, read, save
from unet import Attention, UNet

SMALL = "--width 8 --mults 1 --attention 0 --batch 4 --grid 1 --device cpu --precision fp32".split()


@pytest.fixture
def pictures(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), np.uint8)
    np.savez(tmp_path / "set.npz", images=a, labels=np.arange(60) % 3)
    return tmp_path / "set.npz"


@pytest.fixture
def do(monkeypatch, capsys, pictures, tmp_path):
    """Run train.py or sample.py in this process: do(train, "--method pdm ...") -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def do(module, line, small=True):
        argv = line.split()
        if module is train and small:
            chain = ["--T", "30"] if not {"edm", "patch_diffusion"} & set(argv) else []
            argv = SMALL + chain + ["--data", "set.npz", *argv]             # a flag given twice counts as given last
        monkeypatch.setattr(sys, "argv", [module.__name__] + argv)
        code = 0
        try:
            command(module.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return do


# A run

@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_its_checkpoint_log_and_samples_and_the_model_samples_from_the_path_alone(do, tmp_path, method):
    code, out, _ = do(train, f"--method {method} --steps 3 --every 2")
    assert code == 0 and "60 images, 3x16x16, 3 classes" in out
    run = tmp_path / "runs" / method
    assert sorted(p.relative_to(run).as_posix() for p in run.rglob("*")) == [
        "ckpt.pt", "log.csv", "samples", "samples/000002.png", "samples/000003.png"]
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [row["step"] for row in rows] == ["2", "3"] and (rows[-1]["images"] == "12" or method == "patch_diffusion")
    assert all(float(row["rmse_1"]) > 0 for row in rows)
    elsewhere = tmp_path / "moved"
    shutil.move(run, elsewhere)
    code, out, _ = do(sample, f"{elsewhere}/ckpt.pt --n 3 --steps 4 --out {tmp_path}/few")
    assert code == 0 and [Image.open(tmp_path / "few" / f"{i:06d}.png").size for i in range(3)] == [(16, 16)] * 3
    assert do(sample, f"{elsewhere}/ckpt.pt --n 3 --steps 4 --raw {'--eta 0' if 'eta' in flags_of(METHODS[method].sample) else '--S_churn 9'}")[0] == 0
    assert (elsewhere / "samples" / "seed0.png").exists()
    assert do(sample, f"{elsewhere}/ckpt.pt --n 2 --steps 3 --sampler heun")[0] == 0


def test_a_checkpoint_is_plain_and_says_everything(do, tmp_path):
    do(train, "--method pdm --patch 2 --conditional --steps 3")
    checkpoint = torch.load(tmp_path / "runs/pdm/ckpt.pt", weights_only=True)
    assert checkpoint["method"] == "pdm" and checkpoint["config"]["patch"] == (2,) and checkpoint["config"]["lr"] == 2e-3
    assert checkpoint["shape"] == [3, 16, 16] and checkpoint["classes"] == ["0", "1", "2"]
    assert checkpoint["step"] == 3 and checkpoint["images"] == 12
    assert str(tmp_path) not in json.dumps({k: v for k, v in checkpoint["config"].items() }, default=str)


def test_a_method_can_be_built_from_a_plain_dict():
    method = build(dict(method="pdm", config=dict(patch=2, width=8, T=10), shape=[1, 8, 12], classes=["a", "b"]))
    assert method.T == 10 and method.net.net.label.num_embeddings == 3
    assert method.predict(torch.zeros(1, 1, 8, 12), 5, torch.tensor([1])).shape == (1, 1, 8, 12)


def log(path):
    return list(csv.DictReader(open(path / "log.csv")))


def weights(path, key="model"):
    return torch.load(path / "ckpt.pt", weights_only=True)[key]


@pytest.mark.parametrize("flags", ["--method pdm", "--method patch_diffusion", "--method iddpm --objective vlb --conditional --flip --dropout 0.1"])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(do, tmp_path, flags):
    method = flags.split()[1]
    do(train, f"{flags} --steps 6 --every 4 --out whole")
    do(train, f"{flags} --steps 4 --every 4 --out parts")
    assert do(train, f"--method {method} --steps 6 --out parts --resume", small=False)[0] == 0
    for key in ("model", "ema"):
        a, b = weights(tmp_path / "whole", key), weights(tmp_path / "parts", key)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    drop = {"seconds", "images_per_s"}
    logs = [[{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(open(tmp_path / run / "log.csv"))] for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_the_learning_rate_rises_then_falls_as_the_root_of_the_step_and_to_0_in_the_cooldown(do, tmp_path):
    do(train, "--method pdm --steps 9 --every 1 --lr 0.01 --warmup 3 --decay 4 --cooldown 3")
    for step, row in enumerate(log(tmp_path / "runs/pdm")):
        expected = 0.01 * min(1, (step + 1) / 3, (4 / (step + 1)) ** 0.5) * min(1, (9 - step) / 3)
        assert float(row["lr"]) == pytest.approx(expected, rel=1e-4)


def test_accumulating_leaves_the_number_of_images_a_step_alone(do, tmp_path):
    do(train, "--method ddpm --steps 2 --accumulate 4 --out parts")
    assert torch.load(tmp_path / "parts/ckpt.pt", weights_only=True)["images"] == 8


def test_the_averaged_weights_follow_closely_at_first_and_never_drift_off_a_constant(do, tmp_path):
    do(train, "--method ddpm --steps 1 --out one --lr 0")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "one", "ema")
    assert all(torch.equal(a[k], b[k]) for k in a)
    do(train, "--method ddpm --steps 2 --out two --warmup 0")
    first = torch.load(tmp_path / "one/ckpt.pt", weights_only=True)["model"]["net.conv_in.weight"]       # as initialised
    model, ema = (weights(tmp_path / "two", key)["net.conv_in.weight"] for key in ("model", "ema"))
    assert (ema - model).norm() < 0.5 * (model - first).norm()


def test_bf16_trains_to_the_same_loss_within_its_rounding(do, tmp_path):
    for precision in ("fp32", "bf16"):
        assert do(train, f"--method iddpm --steps 4 --every 4 --warmup 0 --lr 0.01 --out {precision} --precision {precision}")[0] == 0
    a, b = (list(csv.DictReader(open(tmp_path / run / "log.csv")))[-1] for run in ("fp32", "bf16"))
    assert abs(float(a["loss"]) - float(b["loss"])) < 0.05 * float(a["loss"]) and a["loss"] != b["loss"]


def test_bf16_is_for_the_network_alone(do, tmp_path, monkeypatch):
    inside = []
    def augment(x, p):
        inside.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return x, torch.zeros(len(x), 9)
    monkeypatch.setattr("edm.augment", augment)
    assert do(train, "--method edm --augment 0.1 --steps 1 --every 1 --out run --precision bf16")[0] == 0
    assert inside == [torch.float32]


def test_compile_reaches_every_network_and_its_failure_is_one_line(do, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda *args: calls.append(id(f)) or f(*args))
    for flags, networks in (("", 0), ("--compile", 2)):
        calls.clear()
        assert do(train, f"--method pdm --patch 4 2 --split_snr 0.25 --steps 4 {flags} --out run{flags}")[0] == 0
        assert len(set(calls)) == networks                                   # both of a split chain
    failure = type("BackendCompilerFailed", (RuntimeError,), dict(__module__="torch._dynamo.exc"))
    def broken(*_):
        raise failure("no compiler\nand a page of trace")
    monkeypatch.setattr(torch, "compile", lambda f: broken)
    code, _, err = do(train, "--method ddpm --steps 4 --compile --out broken")
    assert code == 2 and err.endswith("error: torch.compile does not work here, give --no-compile: no compiler\n") and not (tmp_path / "broken/ckpt.pt").exists()


def test_long_runs_on_cuda_are_compiled_unasked(monkeypatch):
    for triton in (None, "there"):
        monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: triton)
        assert [train.compiles(torch.device(kind), steps) for kind, steps in (("cuda", 19_999), ("cuda", 20_000), ("cpu", 10 ** 6))] == [False, triton is not None, False]


def test_clip_grad_0_is_no_clipping_and_beta_2_reaches_adam(do, tmp_path):
    for name, flags in (("none", "--clip_grad 0"), ("high", "--clip_grad 1e6"), ("low", "--clip_grad 1e-6")):
        assert do(train, f"--method ddpm --steps 2 --every 2 --warmup 0 --beta_2 0.9 --out {name} {flags}")[0] == 0
    none, high, low = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("none", "high", "low"))
    assert none["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(none["model"].values(), high["model"].values()))
    assert any(not torch.equal(a, b) for a, b in zip(none["model"].values(), low["model"].values()))


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save(path, {"a": 1})
    def full(*_):
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no limit on the size of a file, which stands for the full disk")
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before_it(do, tmp_path):
    import resource
    do(train, "--method pdm --steps 2")
    before, limits = (tmp_path / "runs/pdm/ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code, _, err = do(train, "--method pdm --steps 4 --resume", small=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: cannot write") and "ckpt.pt" in err
    assert (tmp_path / "runs/pdm/ckpt.pt").read_bytes() == before and not list(tmp_path.rglob("*.tmp"))
    assert do(train, "--method pdm --steps 4 --resume", small=False)[0] == 0


def test_keep_leaves_so_many_older_checkpoints_beside_the_last(do, tmp_path):
    do(train, "--method pdm --steps 9 --every 2 --keep 2")
    run = tmp_path / "runs/pdm"
    names = ["ckpt-000006.pt", "ckpt-000008.pt", "ckpt-000009.pt", "ckpt.pt"]
    assert sorted(p.name for p in run.glob("*.pt")) == names
    assert [torch.load(run / name, weights_only=True)["step"] for name in names] == [6, 8, 9, 9]
    assert do(sample, f"{run}/ckpt-000006.pt --n 1 --steps 2 --out one.png")[0] == 0


def test_the_log_is_whole_when_a_run_dies_while_it_is_written(do, tmp_path, monkeypatch):
    do(train, "--method pdm --steps 2")
    before, replace = (tmp_path / "runs/pdm/log.csv").read_bytes(), os.replace
    def dies(source, target):
        if str(target).endswith("log.csv"):
            raise SystemExit(9)
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        assert do(train, "--method pdm --steps 4 --resume", small=False)[0] == 9
    assert (tmp_path / "runs/pdm/log.csv").read_bytes() == before and torch.load("runs/pdm/ckpt.pt", weights_only=True)["step"] == 2


def test_no_line_of_the_log_is_lost_or_doubled_when_a_run_dies_before_its_checkpoint_is_written(do, tmp_path, monkeypatch):
    def dies(*_):
        raise SystemExit(9)
    do(train, "--method pdm --steps 2 --every 2")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", dies)
        assert do(train, "--method pdm --steps 6 --resume", small=False)[0] == 9
    assert [row["step"] for row in log(tmp_path / "runs/pdm")] == ["2", "4"]
    do(train, "--method pdm --steps 6 --resume", small=False)
    assert [row["step"] for row in log(tmp_path / "runs/pdm")] == ["2", "4", "6"]


def test_a_run_goes_on_with_moved_images_and_not_with_others(do, tmp_path):
    do(train, "--method pdm --steps 2")
    shutil.move("set.npz", "moved.npz")
    assert do(train, "--method pdm --steps 3 --resume --data moved.npz", small=False)[0] == 0
    np.save("other.npy", np.zeros((60, 3, 16, 16), np.uint8))
    code, _, err = do(train, "--method pdm --steps 4 --resume --data other.npy", small=False)
    assert code == 2 and "other.npy does not hold the images" in err


def test_a_progressive_run_keeps_the_number_of_steps_that_its_sizes_follow(do, tmp_path, monkeypatch):
    loss, sizes = METHODS["patch_diffusion"].loss, []
    def interrupted(self, x, y, size):
        sizes.append(size)
        if sizes == [4, 4, 8]:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, x, y, size)
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["patch_diffusion"], "loss", interrupted)
        assert do(train, "--method patch_diffusion --sizes progressive --steps 8 --every 8 --out parts")[0] == 130
    code, _, err = do(train, "--method patch_diffusion --steps 10 --out parts --resume", small=False)
    assert code == 2 and "--steps, 8" in err
    assert do(train, "--method patch_diffusion --out parts --resume", small=False)[0] == 0
    do(train, "--method patch_diffusion --sizes progressive --steps 8 --out whole")
    a, b = (torch.load(f"{name}/ckpt.pt", weights_only=True) for name in ("parts", "whole"))
    assert a["sizes"] == b["sizes"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_a_gradient_that_is_not_finite_stops_the_run_too_and_the_noise_level_is_named(do, tmp_path, monkeypatch):
    loss, calls = METHODS["pdm"].loss, []
    def broken(self, *a):
        calls.append(1)
        w = next(self.net.parameters())
        return loss(self, *a) + (0 if len(calls) < 3 else (w - w.detach()).square().sum().sqrt())      # 0, and no gradient there
    monkeypatch.setattr(METHODS["pdm"], "loss", broken)
    code, _, err = do(train, "--method pdm --steps 8 --every 2")
    assert code == 2 and re.search(r"not finite at step 3, near t = \d+;", err)
    assert torch.load("runs/pdm/ckpt.pt", weights_only=True)["step"] == 2


def test_the_named_noise_level_is_that_of_the_image_whose_output_broke(do, tmp_path, monkeypatch):
    forward, seen = UNet.forward, []
    def broken(self, x, c_noise, y=None):
        out = forward(self, x, c_noise, y)
        if self.training:
            seen.append(c_noise[1].item())
            out = out + torch.tensor([0, torch.inf, 0, 0]).view(4, 1, 1, 1).nan_to_num(posinf=0) if len(seen) < 2 else out * torch.tensor([1, torch.nan, 1, 1]).view(4, 1, 1, 1)
        return out
    monkeypatch.setattr(UNet, "forward", broken)
    code, _, err = do(train, "--method ddpm --steps 2")
    assert code == 2 and f"step 2, near t = {seen[1]:.0f};" in err


@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm"])
def test_a_noise_level_is_named_in_terms_of_sigma_for_every_preconditioning(precond):
    method = build(dict(method="edm", config=dict(width=8, mults=(1,), attention=(0,), precond=precond), shape=[1, 8, 8], classes=[]))
    c_noise = method.coefficients(torch.tensor(0.5, dtype=torch.float64).view(1, 1, 1, 1))[3].flatten()[0]
    assert float(train.noise_level(method, c_noise).removeprefix("sigma = ")) == pytest.approx(0.5, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(do, tmp_path, monkeypatch):
    do(train, "--method pdm --steps 2")
    before = (tmp_path / "runs/pdm/ckpt.pt").read_bytes()
    loss, calls = METHODS["pdm"].loss, []
    monkeypatch.setattr(METHODS["pdm"], "loss", lambda *a: loss(*a) * (float("inf") if calls.append(1) or len(calls) == 2 else 1))
    code, _, err = do(train, "--method pdm --steps 8 --resume", small=False)
    assert code == 2 and "step 4" in err and (tmp_path / "runs/pdm/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_where_and_resuming_is_exact(do, tmp_path, monkeypatch, number):
    loss, calls = METHODS["pdm"].loss, []
    def interrupted(*a):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return loss(*a)
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["pdm"], "loss", interrupted)
        code, out, _ = do(train, "--method pdm --steps 6 --out parts")
    assert code == 130 and "parts/ckpt.pt" in out and torch.load("parts/ckpt.pt", weights_only=True)["step"] == 3
    do(train, "--method pdm --steps 6 --out parts --resume", small=False)
    do(train, "--method pdm --steps 6 --out whole")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [row["loss"] for row in log(tmp_path / "whole")] == [row["loss"] for row in log(tmp_path / "parts")]


@pytest.mark.parametrize("method, flags", [
    ("ddpm", "--variance small --T 50 --steps 190 --width 24"), ("iddpm", "--T 30 --steps 150 --width 24"), ("pdm", "--patch 2 --T 50 --steps 60 --width 16"),
    ("edm", "--steps 110 --width 16")])
def test_one_overfitted_image_comes_back(tmp_path, method, flags, do):
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[0, 0, 2:6, 2:6], image[0, 1, :, :4], image[0, 2, 4:] = 255, 200, 120
    np.save(tmp_path / "one.npy", image)
    code, out, err = do(train, f"--method {method} {flags} --data one.npy --overfit 1 --batch 8 --grid 1 --lr 1e-2 --decay 0 "
                        "--mults 1 --attention 0 --warmup 20 --device cpu --precision fp32", small=False)
    assert code == 0, err
    do(sample, f"runs/{method}/ckpt.pt --n 4 --out back")
    for i in range(4):
        back = np.asarray(Image.open(tmp_path / "back" / f"{i:06d}.png")).transpose(2, 0, 1).astype(float)
        assert np.sqrt(np.square(back - image[0]).mean()) < 25                # of 255; the pixels' own spread is 95


def test_a_part_of_a_data_set_has_images_of_every_class_and_what_is_held_out_is_not_trained_on():
    images, labels = torch.arange(1000).view(1000, 1, 1, 1), torch.arange(10).repeat_interleave(100)       # as a folder's images come
    (some, classes), (held, _) = train.hold_out(images, labels, 50)
    assert len(some) == 50 == len(some.unique()) and set(classes.tolist()) == set(range(10)) and torch.equal(held, some)
    (rest, _), (held, classes) = train.hold_out(images, labels, 0)
    assert len(rest) == 950 and set(classes.tolist()) == set(range(10)) and torch.equal(torch.cat([rest, held]).flatten().sort()[0], torch.arange(1000))
    assert torch.equal(train.hold_out(images, labels, 5000)[0][0], images)


def test_a_run_on_crops_counts_the_images_it_saw_and_logs_the_shares_of_the_sizes(do, tmp_path):
    do(train, "--method patch_diffusion --steps 40 --every 20 --p_full 0.25")
    rows, sizes = list(csv.DictReader(open(tmp_path / "runs/patch_diffusion/log.csv"))), torch.load(tmp_path / "runs/patch_diffusion/ckpt.pt", weights_only=True)["sizes"]
    assert list(sizes) == [16, 8, 4] and sum(sizes.values()) == 40 and min(sizes.values()) > 1
    assert [float(rows[-1][f"share_{s}"]) for s in sizes] == [count / 40 for count in sizes.values()]
    assert int(rows[-1]["images"]) == 4 * (sizes[16] + 2 * sizes[8] + 4 * sizes[4])


# Flags

@pytest.mark.parametrize("function", [UNet, train.train, sample.sample, *METHODS.values(), *(m.sample for m in METHODS.values())],
                         ids=lambda f: f.__qualname__)
def test_every_keyword_argument_is_a_flag_with_a_type_and_a_help(function):
    flags, target = flags_of(function), function.__init__ if inspect.isclass(function) else function
    keywords = {n for n, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY} - {"classes", "randn_like"}
    assert set(flags) == keywords and all(len(help) > 5 for _, help in flags.values())
    defaults = add_flags(train.Parser(), "flags", function)
    assert all(defaults[name] == p.default for name, (p, _) in flags.items())


def test_flags_reach_the_method_and_the_network(do, tmp_path):
    do(train, "--method pdm --patch 2 --predict v --weight snr+1 --no-clip --schedule linear0.025 --steps 1 --dropout 0.25 --blocks 2")
    method, _ = load(tmp_path / "runs/pdm/ckpt.pt", device="cpu")
    assert (method.target, method.weight, method.clip, method.net.P) == ("v", "snr+1", False, 2)
    assert abs(1 - method.alpha_bar[30] / method.alpha_bar[29] - 0.025 * 1000 / 30) < 1e-6
    assert method.net.net.down[0][1].dropout.p == 0.25


def test_attention_is_turned_off_by_naming_no_level(do, tmp_path):
    do(train, "--method ddpm --steps 1 --attention")
    method, _ = load(tmp_path / "runs/ddpm/ckpt.pt", device="cpu")
    assert not any(isinstance(module, Attention) for module in method.modules())


@pytest.mark.parametrize("line, word", [
    ("", "lists"), ("--help", "pdm"), ("--method pdm --help", "--patch"), ("--method iddpm --help", "--objective"), ("--method ddpm --help", "--width")])
def test_help_lists_the_methods_and_the_flags_of_each(do, line, word):
    code, out, err = do(train, line, small=False)
    assert code == 0 and not err and (word in out or word == "lists" and "ddpm" in out)


# What a user does wrong

BAD = [
    ("--method pdm --data nowhere", "nowhere"), ("--method pdm --data .", ".npz"),
    ("--method pdm --patch 5 --mults 1 1", "--size 10 or 20"), ("--method pdm --patch 0", "patch"), ("--method ddpm --mults 1 1 1 1 1 1", "--size 32"),
    ("--method pdm --steps 0", "--steps"), ("--method pdm --batch 0", "--batch"), ("--method pdm --steps few", "few"),
    ("--method ddpm --patch 4", "--patch belongs to pdm"), ("--method dppm", "pdm"), ("--steps 3", "choose a method"),
    ("--method edm --precond ddim", "ddim"), ("--method patch_diffusion --p_full 2", "--p_full"), ("--method patch_diffusion --size 20 --mults 1 1", "R/4"),
    ("--method edm --p_full 1", "--p_full belongs to patch_diffusion"), ("--method edm --augment 2", "--augment"), ("--method pdm --sigma_data 1", "--sigma_data belongs to edm"),
    ("--method pdm --stps 4", "--steps"), ("--method pdm --conditional --data plain.npy", "classes"), ("--method pdm --accumulate 3", "--batch 4"),
    ("--method pdm --device quantum", "quantum"), ("--method pdm --resume", "ckpt.pt"), ("--method pdm --predict noise", "noise"),
    ("--method pdm --data digits --flip", "mirror"), ("--method ddpm --T 10", "larger T"), ("--method pdm --size 16 16 16", "size"),
    ("--method pdm --attention 4", "--attention"), ("--method pdm --width 0", "--width"), ("--method pdm --mults", "--mults"), ("--method pdm --size", "--size"), ("--method pdm extra", "extra"),
    ("--method pdm --lr -1", "--lr"), ("--method pdm --ema 2", "--ema"), ("--method pdm --channels 2", "channels"), ("--method pdm --overfit -1", "--overfit")]


@pytest.mark.parametrize("line, word", BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_error_line_and_writes_nothing(do, tmp_path, line, word):
    np.save(tmp_path / "plain.npy", np.zeros((8, 3, 16, 16), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = do(train, line if line.startswith("--steps") else f"--steps 2 {line}")
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_a_run_is_left_alone_unless_resumed(do, tmp_path):
    do(train, "--method pdm --steps 2")
    before = (tmp_path / "runs/pdm/ckpt.pt").read_bytes()
    for line, word in (("--method pdm --steps 4", "--resume"), ("--method pdm --steps 4 --resume --width 16", "--width"), ("--method pdm --steps 2 --resume", "--steps"),
                       ("--method ddpm --out runs/pdm --steps 4 --resume", "pdm")):
        code, _, err = do(train, line, small="--resume" not in line)
        assert code == 2 and word in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "runs/pdm/ckpt.pt").read_bytes() == before


def test_foreign_checkpoints_are_refused(do, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    torch.save({"model": 1}, tmp_path / "other.pt")
    torch.save(UNet(1, 1, width=8), tmp_path / "pickled.pt")
    torch.save({"method": "ddpm", "config": {}, "shape": [3, 8, 8], "classes": [], "ema": {}}, tmp_path / "hollow.pt")
    do(train, "--method ddpm --steps 1 --out own")
    own = torch.load("own/ckpt.pt", weights_only=True)
    torch.save(own | dict(config=own["config"] | dict(width=50_000)), tmp_path / "giant.pt")          # tens of GB, if it were built
    torch.save(own | dict(config=own["config"] | dict(T=10 ** 12)), tmp_path / "endless.pt")
    torch.save(own | dict(config=own["config"] | dict(mults="12")), tmp_path / "odd.pt")
    torch.save(own | dict(shape=[3, 8]), tmp_path / "flat.pt")
    torch.save(own | dict(version=own["version"] + 1), tmp_path / "later.pt")
    torch.save(own | dict(ema={k: 1 for k in own["ema"]}), tmp_path / "numbers.pt")
    for name in ("junk", "other", "pickled", "hollow", "missing", "giant", "endless", "odd", "flat", "later", "numbers"):
        code, _, err = do(sample, f"{name}.pt")
        assert code == 2 and f"{name}.pt" in err and len(err.strip().splitlines()) == 1, err


def test_the_command_itself_prints_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, HERE.parent / "train.py", "--method", "pdm", "--data", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: no such file or folder: nowhere\n" and not list(tmp_path.iterdir())


def test_parts_trained_apart_are_joined_to_one_model(do, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "experiments"))
    import join_parts
    for k in (0, 1):
        assert do(train, f"--method pdm --patch 4 2 --split_snr 0.25 --part {k} --steps 2 --lr 0.01 --warmup 0 --out p{k}")[0] == 0
    assert do(join_parts, "p1/ckpt.pt p0/ckpt.pt both.pt")[0] == 0
    for k, path, levels in ((0, "p0/ckpt.pt", {"3", "10"}), (1, "p1/ckpt.pt", {"0.1", "0.3", "1"})):         # SNR = 1 / sigma^2 is 0.25 at sigma = 2
        code, _, err = do(sample, f"{path} --n 1 --steps 4")
        assert code == 2 and "one part of a chain" in err and not list((tmp_path / f"p{k}/samples").iterdir())
        assert {name[5:] for name, value in list(csv.DictReader(open(tmp_path / f"p{k}/log.csv")))[-1].items() if name.startswith("rmse_") and value} == levels
    a, b, both = ((build(read(path)), read(path)) for path in ("p0/ckpt.pt", "p1/ckpt.pt", "both.pt"))
    a, b, both = (model.load_state_dict(checkpoint["ema"]) and model.net.nets for model, checkpoint in (a, b, both))
    for mine, other, joined in ((a[0], b[0], both[0]), (b[1], a[1], both[1])):
        assert all(torch.equal(x, z) for x, z in zip(mine.parameters(), joined.parameters()))
        assert any(not torch.equal(y, z) for y, z in zip(other.parameters(), joined.parameters()))
    assert do(sample, "both.pt --n 1 --steps 4 --sampler heun --out one.png")[0] == 0
    for line in ("p0/ckpt.pt p0/ckpt.pt new.pt", "p0/ckpt.pt p1/ckpt.pt both.pt", "p0/ckpt.pt new.pt", "both.pt both.pt new.pt"):
        code, _, err = do(join_parts, line)
        assert code == 2 and err.startswith("error: ") and not (tmp_path / "new.pt").exists()
