import csv
import functools
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import HERE
from tiny import Command, write_set
from torch import nn

import train
from plumbing import checkpoint, flags, runs
from plumbing.checkpoint import METHODS
from plumbing.flags import flags_of
from plumbing.runs import save_pictures
from train import preview
from unet import Attention, UNet

SMALL = (
    "--width 8 --mults 1 --batch 4 --grid 1 --size 8 --device cpu --precision fp32 "
    "--data set.npz"
)
# Short chains; no attention, of which all have some by default
SMALLEST = {
    "ddpm": "--T 22 --attention",
    "iddpm": "--T 4 --attention",
    "pdm": "--T 4 --attention",
    "edm": "--attention",
    "patch_diffusion": "--attention",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    tiny.draw_no_pictures(monkeypatch)


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    """For tests of runs that draw them."""
    monkeypatch.setattr(train, "preview", preview)
    monkeypatch.setattr(runs, "save_pictures", save_pictures)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run train.py in this process: command("--method pdm") -> (exit code, stdout, stderr)."""
    return functools.partial(Command(monkeypatch, capsys), train)


@pytest.fixture
def do(command):
    """The same with tiny settings, of which each can be given again."""

    def do(line):
        method = re.search(r"--method (\w+)", line)[1]
        return command(f"{SMALL} {SMALLEST[method]} {line}")

    return do


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder runs/ after two steps of PDM; `two_steps` gives a test its own."""
    folder = tmp_path_factory.mktemp("trained")
    line = f"{SMALL} {SMALLEST['pdm']} --method pdm --patch 2 --steps 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_set()
        train.main(line.split())
    return folder / "runs"


@pytest.fixture
def two_steps(trained):
    shutil.copytree(trained, "runs")


def read(run):
    return torch.load(f"{run}/ckpt.pt", weights_only=True)


def log(run):
    with open(f"{run}/log.csv") as file:
        return list(csv.DictReader(file))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def last_line(err):
    return err.strip().splitlines()[-1]


class Broken:
    """A method's loss that does something at one of its calls, the dry pass not counted."""

    def __init__(self, monkeypatch, method, at, what):
        self.loss = METHODS[method].loss
        self.calls = 0
        self.at = at
        self.what = what
        broken = self

        def loss(self, *arguments):
            return broken.call(self, *arguments)

        monkeypatch.setattr(METHODS[method], "loss", loss)

    def call(self, method, x, *rest):
        loss = self.loss(method, x, *rest)
        if len(x) < 4:  # the dry pass
            return loss
        self.calls += 1
        return self.what(loss, method) if self.calls == self.at else loss


# A run

@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_checkpoint_log_and_samples_and_moves_as_a_folder(do, pictures, method):
    code, out, _ = do(f"--method {method} --steps 3 --every 2")
    assert code == 0
    assert "60 images, 3x8x8, 3 classes, mean 0.0" in out
    assert re.search(r"\d+ parameters, cpu, fp32, to runs", out)
    files = {str(p.relative_to("runs")) for p in Path("runs").rglob("*.*")}
    names = ["ckpt.pt", "curves.png", "log.csv"]
    names += ["samples/000002.png", "samples/000003.png", "samples/progress.png"]
    assert files == {f"{method}/{name}" for name in names}
    assert [row["step"] for row in log(f"runs/{method}")] == ["2", "3"]
    assert all(float(row["rmse_1"]) > 0 for row in log(f"runs/{method}"))
    shutil.move(f"runs/{method}", "elsewhere")
    model, saved = checkpoint.load("elsewhere", device="cpu")
    assert saved["step"] == 3
    assert not model.training


def test_a_checkpoint_is_plain_and_says_everything(do, tmp_path):
    do("--method pdm --patch 2 --conditional --steps 3")
    saved = read("runs/pdm")
    assert saved["method"] == "pdm"
    assert saved["config"]["patch"] == (2,)
    assert saved["config"]["lr"] == 1e-3
    assert saved["shape"] == [3, 8, 8]
    assert saved["classes"] == ["0", "1", "2"]
    assert saved["step"] == 3
    assert saved["images"] == 12
    assert not {"out", "device", "resume", "compile"} & saved["config"].keys()
    assert str(tmp_path) not in json.dumps(saved["config"])


@pytest.mark.parametrize(
    "line",
    [
        "--method ddpm --conditional --flip --dropout 0.1",
        "--method iddpm --objective vlb --conditional --accumulate 2",
        "--method pdm --patch 2 --split_snr 1",
        "--method edm --augment 0.2 --attention 0",
        "--method patch_diffusion",
    ],
)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(do, command, line):
    method = line.split()[1]
    do(f"{line} --steps 4 --every 2 --out whole")
    do(f"{line} --steps 2 --every 2 --out parts")
    assert command(f"--method {method} --steps 4 --out parts --resume")[0] == 0
    whole, parts = read("whole"), read("parts")
    assert equal(whole["model"], parts["model"])
    assert equal(whole["ema"], parts["ema"])
    assert whole["sizes"] == parts["sizes"]
    for row, other in zip(log("whole"), log("parts"), strict=True):
        for name in row.keys() - {"seconds", "images_per_s"}:
            assert row[name] == other[name], name


def test_random_numbers_depend_on_seed_step_and_part_alone(do, monkeypatch):
    drawn = {}

    def remembering(*arguments):
        x, y = draw_batch(*arguments)
        drawn.setdefault(run, []).append(x)
        torch.rand(run)  # draws of another method
        return x, y

    draw_batch = train.draw_batch
    monkeypatch.setattr(train, "draw_batch", remembering)
    for run, line in ((1, "--seed 0"), (2, "--seed 0"), (3, "--seed 1")):
        do(f"--method pdm --patch 2 --steps 2 --accumulate 2 --out {run} {line}")
    assert all(map(torch.equal, drawn[1], drawn[2]))
    assert not torch.equal(drawn[1][0], drawn[3][0])
    assert not torch.equal(drawn[1][0], drawn[1][1])


def test_the_learning_rate_rises_falls_as_the_root_of_the_step_and_to_0_in_cooldown(do):
    expected = []
    for step in range(9):
        rise = (step + 1) / 4
        fall = (5 / (step + 1)) ** 0.5
        expected.append(0.01 * min(1, rise, fall) * min(1, (9 - step) / 2))
    rates = [train.learning_rate(step, 9, 0.01, 4, 5, 2) for step in range(9)]
    assert rates == pytest.approx(expected, rel=1e-6)
    do("--method pdm --steps 9 --every 3 --lr 0.01 --warmup 4 --decay 5 --cooldown 2")
    logged = [float(row["lr"]) for row in log("runs/pdm")]
    assert logged == pytest.approx([expected[2], expected[5], expected[8]], rel=1e-6)


def test_a_cooldown_lasts_for_half_of_a_short_run_at_most():
    rates = [train.learning_rate(step, 8, 1.0, 0, 0, 1000) for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_accumulating_leaves_the_number_of_images_a_step_alone(do):
    do("--method ddpm --steps 2 --accumulate 4")
    assert read("runs/ddpm")["images"] == 8


def test_the_logged_loss_is_the_mean_since_the_last_row(do):
    do("--method pdm --patch 2 --steps 2 --every 1 --out each")
    do("--method pdm --patch 2 --steps 2 --every 2 --out all")
    losses = [float(row["loss"]) for row in log("each")]
    assert float(log("all")[0]["loss"]) == pytest.approx(np.mean(losses), abs=2e-5)


def test_the_averaged_weights_count_images_and_follow_closely_at_first():
    ema, batch = 0.999, 4
    assert train.average_decay(ema, batch, 0, batch) == pytest.approx(1 / 10)
    assert train.average_decay(ema, batch, 36, batch) == pytest.approx(10 / 19)
    assert train.average_decay(ema, batch, 10 ** 9, batch) == pytest.approx(ema)
    of_crops = train.average_decay(ema, batch, 36, 4 * batch)
    assert of_crops == pytest.approx((10 / 19) ** 4)


def test_the_average_moves_by_one_minus_its_decay_and_buffers_are_copied():
    method, averaged = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(method.weight, 2.0)
    method.running_mean.fill_(5.0)
    train.update_average([averaged.weight], [method.weight], 0.75)
    train.copy_buffers(averaged, method)
    assert averaged.weight.tolist() == [1.25] * 3
    assert averaged.running_mean.tolist() == [5.0] * 3


def test_clip_grad_0_is_no_clipping(do):
    for name, norm in (("none", "0"), ("high", "1e6"), ("low", "1e-6")):
        line = f"--method ddpm --steps 2 --every 2 --warmup 0 --out {name}"
        assert do(f"{line} --clip_grad {norm}")[0] == 0
    assert equal(read("none")["model"], read("high")["model"])
    assert not equal(read("none")["model"], read("low")["model"])


def test_beta_2_reaches_adam(do, monkeypatch):
    betas = []
    adam = torch.optim.Adam

    def remembering(*arguments, **options):
        betas.append(options["betas"])
        return adam(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", remembering)
    do("--method ddpm --steps 1 --beta_2 0.9")
    assert betas == [(0.9, 0.9)]


def test_bf16_trains_to_the_same_loss_within_its_rounding(do, pictures):
    line = "--method iddpm --steps 4 --every 4 --warmup 0 --lr 0.01"
    for precision in ("fp32", "bf16"):
        assert do(f"{line} --out {precision} --precision {precision}")[0] == 0
    fp32, bf16 = (float(log(run)[-1]["loss"]) for run in ("fp32", "bf16"))
    assert abs(fp32 - bf16) < 0.05 * fp32
    assert fp32 != bf16


def test_compile_reaches_the_network_and_its_failure_is_one_line(do, monkeypatch):
    compiled = []

    def remembering(net):
        compiled.append(net)

    failure = type("BackendFailed", (RuntimeError,), dict(__module__="torch._dynamo.exc"))

    def broken(*_):
        raise failure("no compiler\nand a page of trace")

    monkeypatch.setattr(nn.Module, "compile", remembering)
    assert do("--method pdm --patch 2 --steps 1 --compile")[0] == 0
    assert len(compiled) == 1
    monkeypatch.setattr(nn.Module, "compile", broken)
    code, _, err = do("--method ddpm --steps 4 --compile")
    assert code == 2
    assert last_line(err) == (
        "error: torch.compile does not work here, give --no-compile: no compiler"
    )
    assert not os.path.exists("runs/ddpm/ckpt.pt")


@pytest.mark.parametrize("count, size, trained, held", [(60, 8, 57, 3), (30, 8, 30, 30)])
def test_held_out_images_are_not_trained_on_unless_there_are_few(count, size, trained, held):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    (rest, _), (held_out, _) = runs.prepare(images, None, 0, torch.device("cpu"))
    assert (len(rest), len(held_out)) == (trained, held)


def test_crops_count_as_the_images_they_are_and_the_log_has_their_shares(do):
    do("--method patch_diffusion --steps 30 --every 30 --p_full 0.25")
    sizes = read("runs/patch_diffusion")["sizes"]
    last = log("runs/patch_diffusion")[-1]
    assert set(sizes) == {8, 4, 2}
    assert sum(sizes.values()) == 30
    for size, count in sizes.items():
        assert float(last[f"share_{size}"]) == pytest.approx(count / 30, abs=1e-4)
    assert int(last["images"]) == 4 * (sizes[8] + 2 * sizes[4] + 4 * sizes[2])


@pytest.mark.parametrize(
    "line",
    [
        "--method ddpm --attention --variance small --T 50 --steps 80 --cooldown 40",
        "--method iddpm --attention --T 30 --steps 70 --cooldown 35",
        "--method pdm --attention --patch 2 --T 50 --steps 20 --cooldown 10",
        "--method edm --attention --P_mean -0.5 --steps 60 --cooldown 30",
    ],
)
def test_one_overfitted_image_comes_back(command, line):
    image = np.zeros((1, 3, 4, 4), np.uint8)
    image[0, 0, 1:3, 1:3] = 255
    image[0, 1, :, :2] = 200
    image[0, 2, 2:] = 120
    np.save("one.npy", image)
    code, _, err = command(
        f"{line} --data one.npy --overfit 1 --grid 1 --lr 2e-2 --warmup 5 --decay 0 --width 24 "
        "--mults 1 --device cpu --precision fp32 --out run"
    )
    assert code == 0, err
    method, saved = checkpoint.load("run", device="cpu")
    samples = preview(method, dict(shape=saved["shape"], classes=[]), 4, 4)
    expected = torch.tensor(image) / 127.5 - 1
    errors = (samples - expected).square().mean((1, 2, 3)).sqrt()
    assert errors.max() < 0.2  # the pixels' own spread is 0.75


def test_latents_force_their_flags_and_say_so(do, pictures):
    np.save("latents.npy", np.random.default_rng(0).normal(size=(50, 4, 8, 8)).astype("f4"))
    code, out, _ = do("--method iddpm --steps 1 --data latents.npy --size 8")
    assert code == 0
    assert "--no-clip --objective simple" in out
    saved = read("runs/iddpm")
    assert saved["latents"]
    assert (saved["config"]["clip"], saved["config"]["objective"]) == (False, "simple")
    code, _, err = do("--method iddpm --steps 1 --data latents.npy --objective vlb --out new")
    assert code == 2
    assert "--objective vlb is for pixels; latents want --objective simple" in err


# What ends a run

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_resuming_is_exact(
    do, command, monkeypatch, number
):
    def interrupted(loss, method):
        signal.raise_signal(number)
        return loss

    with monkeypatch.context() as patch:
        Broken(patch, "pdm", at=3, what=interrupted)
        code, out, _ = do("--method pdm --patch 2 --steps 6 --out parts")
    assert code == 128 + number
    assert f"{Path('parts/ckpt.pt')} is written" in out
    assert read("parts")["step"] == 3
    command("--method pdm --steps 6 --out parts --resume")
    do("--method pdm --patch 2 --steps 6 --out whole")
    assert equal(read("whole")["model"], read("parts")["model"])
    assert log("whole")[0]["loss"] == log("parts")[0]["loss"]


def test_a_second_signal_interrupts_when_two_seconds_have_passed():
    with runs.Stop() as stop:
        stop.ask(signal.SIGINT, None)
        stop.ask(signal.SIGINT, None)  # torchrun passes on what its processes have had
        stop.asked -= 3
        with pytest.raises(KeyboardInterrupt):
            stop.ask(signal.SIGINT, None)


def infinite(loss, method):
    return loss * float("inf")


def without_gradient(loss, method):
    weight = next(method.parameters())
    return loss + (weight - weight.detach()).square().sum().sqrt()  # 0, and no slope there


@pytest.mark.parametrize("what", [infinite, without_gradient])
def test_a_loss_or_gradient_not_finite_names_the_step_and_keeps_the_checkpoint(
    do, monkeypatch, what
):
    Broken(monkeypatch, "pdm", at=3, what=what)
    code, _, err = do("--method pdm --patch 2 --steps 8 --every 2")
    assert code == 2
    assert "not finite at step 3" in last_line(err)
    assert read("runs/pdm")["step"] == 2


def test_a_run_goes_on_with_moved_images_and_not_with_others(two_steps, command):
    shutil.move("set.npz", "moved.npz")
    resume = "--method pdm --steps 3 --resume --data"
    np.save("other.npy", np.zeros((60, 3, 8, 8), np.uint8))
    code, _, err = command(f"{resume} other.npy")
    assert code == 2
    assert "other.npy does not hold the images" in err
    assert command(f"{resume} moved.npz")[0] == 0


def test_a_run_goes_on_with_its_own_classes_only(do, command):
    do("--method pdm --patch 2 --steps 2 --conditional")
    images = np.load("set.npz")["images"]
    np.savez("two.npz", images=images, labels=np.arange(len(images)) % 2)
    code, _, err = command("--method pdm --steps 3 --resume --data two.npz")
    assert code == 2
    assert "two.npz does not hold the images and classes" in err


def test_a_run_goes_on_with_its_own_method_whatever_its_flags_say(two_steps, command):
    saved = read("runs/pdm")
    saved["config"]["method"] = "ddpm"
    torch.save(saved, "runs/pdm/ckpt.pt")
    code, _, err = command("--method ddpm --out runs/pdm --steps 3 --resume")
    assert code == 2
    assert "--method is pdm" in err


def test_a_progressive_run_keeps_the_steps_that_its_sizes_follow(do, command, monkeypatch):
    def interrupted(loss, method):
        signal.raise_signal(signal.SIGTERM)
        return loss

    line = "--method patch_diffusion --sizes progressive --steps 8"
    with monkeypatch.context() as patch:
        Broken(patch, "patch_diffusion", at=3, what=interrupted)
        assert do(f"{line} --out parts")[0] == 128 + signal.SIGTERM
    resume = "--method patch_diffusion --out parts --resume"
    code, _, err = command(f"{resume} --steps 10")
    assert code == 2
    assert "--steps, 8" in err
    assert command(resume)[0] == 0
    do(f"{line} --out whole")
    assert read("parts")["sizes"] == read("whole")["sizes"]
    assert equal(read("parts")["model"], read("whole")["model"])


def test_a_folder_that_holds_a_run_is_left_alone_unless_resumed(two_steps, command):
    before = read("runs/pdm")
    for line, word in (
        ("--method pdm --steps 4", "--resume"),
        ("--method pdm --steps 4 --resume --width 16", "--width is 8"),
        ("--method pdm --steps 2 --resume", "--steps"),
        ("--method ddpm --out runs/pdm --steps 4 --resume", "--method is pdm"),
    ):
        code, _, err = command(line)
        assert code == 2
        assert word in err
        assert len(err.splitlines()) == 1
    assert equal(before["model"], read("runs/pdm")["model"])


def test_a_folder_that_another_process_trains_in_is_refused_in_one_line(two_steps, command):
    with checkpoint.locked(Path("runs/pdm")):
        code, _, err = command("--method pdm --steps 4 --resume")
    assert code == 2
    assert err.splitlines() == ["error: another process is training in runs/pdm now"]


def test_a_value_that_is_the_same_can_be_given_again_on_resume(do, command, pictures):
    do("--method pdm --steps 1")
    assert command("--method pdm --steps 2 --resume --patch 4 --T 4")[0] == 0


# A run that begins with the weights of another

def test_weights_and_average_begin_as_the_average_of_another_run(do):
    do("--method ddpm --steps 3 --lr 0.01 --warmup 0 --out a")
    before = read("a")
    code, out, _ = do("--method ddpm --init a --steps 1 --lr 0 --seed 1 --out b")
    assert code == 0
    assert f"taken from a: {len(before['ema'])} of {len(before['ema'])} tensors" in out
    after = read("b")
    assert not equal(before["ema"], before["model"])
    assert equal(before["ema"], after["model"])
    for name, weight in after["ema"].items():
        assert torch.allclose(weight, before["ema"][name], atol=1e-6)
    assert (after["step"], after["images"]) == (1, 4)
    assert after["config"]["init"] == "a"


def test_edm_goes_on_as_patch_diffusion(do):
    do("--method edm --steps 2 --out a")
    code, out, _ = do("--method patch_diffusion --init a/ckpt.pt --steps 1 --lr 0 --out b")
    assert code == 0
    assert "in part: net.conv_in.weight, net.straight.weight" in out
    conv_in = read("b")["model"]["net.conv_in.weight"]
    assert torch.equal(conv_in[:, :3], read("a")["ema"]["net.conv_in.weight"])
    assert not conv_in[:, 3:].any()


def test_a_run_that_began_with_another_goes_on_without_it(do, command):
    do("--method ddpm --steps 2 --out a")
    for out, steps in (("whole", 4), ("parts", 2)):
        do(f"--method ddpm --init a --steps {steps} --every 2 --out {out}")
    shutil.rmtree("a")
    resume = "--method ddpm --out parts --resume"
    assert command(f"{resume} --steps 3 --init a")[0] == 0
    assert command(f"{resume} --steps 4")[0] == 0
    assert equal(read("whole")["model"], read("parts")["model"])


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a run of one step of DDPM."""
    folder = tmp_path_factory.mktemp("one_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_set()
        train.main(f"{SMALL} {SMALLEST['ddpm']} --method ddpm --steps 1 --out a".split())
    return folder / "a"


@pytest.mark.parametrize(
    "line, word",
    [
        ("--method ddpm --init nowhere --out b", "no such checkpoint: nowhere"),
        ("--method ddpm --init set.npz --out b", "set.npz is not a checkpoint"),
        ("--method pdm --patch 2 --init a --out b", "nothing in a fits: it is ddpm, --width 8"),
        ("--method ddpm --init a --out a", "a holds a run already"),
        ("--method ddpm --init a --out a --resume", "goes on with a/ckpt.pt: give one"),
    ],
)
def test_a_run_to_begin_with_that_cannot_be_is_one_line_and_writes_nothing(
    do, one_step, tmp_path, line, word
):
    shutil.copytree(one_step, "a")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = do(f"{line} --steps 2")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert word in err
    assert sorted(tmp_path.rglob("*")) == before


# A faulty method

class Flow(nn.Module):
    """A sixth paper: straight lines from noise to images."""

    sigma_min, sigma_max = 0.0, 100.0

    def __init__(self, make_net, channels, *, clip: bool = True):  # clip to [-1, 1]
        super().__init__()
        self.net = make_net(channels, channels)

    def v(self, x, t, y):
        return self.net(x, t.expand(len(x), 1, 1, 1).flatten(), y)

    def loss(self, x_0, y=None):
        t = torch.rand(len(x_0), 1, 1, 1)
        eps = torch.randn_like(x_0)
        return (eps - x_0 - self.v((1 - t) * x_0 + t * eps, t, y)).square().mean()

    def D(self, x, sigma, y=None):
        t = torch.as_tensor(sigma / (1 + sigma), dtype=torch.float32).view(-1, 1, 1, 1)
        return x / (1 + sigma) - t * self.v(x / (1 + sigma), t, y)

    def round_sigma(self, sigma):
        return sigma

    def sample(self, noise, y=None, *, steps: int = 2, randn_like=torch.randn_like):
        for i in range(steps, 0, -1):
            x_0_hat = noise - i / steps * self.v(noise, torch.tensor(i / steps), y)
            noise = x_0_hat + (i - 1) / i * (noise - x_0_hat)
            yield noise, x_0_hat


def test_a_sixth_paper_is_one_line_in_the_list_of_methods(pictures, monkeypatch):
    monkeypatch.setitem(METHODS, "flow", Flow)
    line = f"{SMALL} --method flow --steps 2 --conditional"
    train.main(line.split())
    train.main(["--method", "flow", "--resume", "--steps", "4"])
    assert checkpoint.load("runs/flow", device="cpu")[1]["step"] == 4


@pytest.mark.parametrize("lost", ["loss", "sample", "round_sigma", "D"])
def test_a_method_that_lacks_a_part_fails_before_the_first_step(command, monkeypatch, lost):
    lacking = type("Lacking", (nn.Module,), dict(vars(Flow)))
    delattr(lacking, lost)
    lacking.__init__ = make_flow
    monkeypatch.setitem(METHODS, "flow", lacking)
    code, _, err = command(f"{SMALL} --method flow")
    assert code == 2
    assert re.match(rf"error: Lacking has no .*{lost}.*docs/add_a_paper.md", last_line(err))
    assert not os.path.exists("runs")


def make_flow(self, make_net, channels, *, clip: bool = True):
    nn.Module.__init__(self)
    self.net = make_net(channels, channels)


def loss_per_image(self, x_0, y=None):
    return x_0.mean((1, 2, 3))


def sample_only(self, noise, y=None, **_):
    yield noise


@pytest.mark.parametrize("name, faulty", [("loss", loss_per_image), ("sample", sample_only)])
def test_a_part_that_gives_something_else_fails_before_the_first_step(
    command, monkeypatch, name, faulty
):
    monkeypatch.setattr(Flow, name, faulty)
    monkeypatch.setitem(METHODS, "flow", Flow)
    code, _, err = command(f"{SMALL} --method flow")
    assert code == 2
    assert f"Flow has no {name}(" in last_line(err)


def test_the_dry_pass_leaves_the_history_of_losses_alone(do):
    do("--method iddpm --objective vlb --steps 1")
    assert read("runs/iddpm")["model"]["sampler.count"].sum() == 4


# Flags

@pytest.mark.parametrize(
    "function",
    [UNet, train.train, *METHODS.values(), *(method.sample for method in METHODS.values())],
)
def test_every_keyword_argument_is_a_flag_with_a_type_and_a_help(function):
    target = function.__init__ if inspect.isclass(function) else function
    parameters = inspect.signature(target).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    handed_on = {"classes", "randn_like", "betas", "planes"}  # by other code: no flags
    assert set(flags_of(function)) == keywords - handed_on
    assert all(len(flags.help_of(function, name)) > 5 for name in flags_of(function))


def test_flags_reach_the_method_and_the_network(do):
    do("--method pdm --patch 2 --weight snr+1 --no-clip --steps 1 --dropout 0.25 --blocks 2")
    method, _ = checkpoint.load("runs/pdm", device="cpu")
    assert method.weight == "snr+1"
    assert method.clip is False
    assert method.T == 4
    dropouts = [module.p for module in method.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 5
    assert set(dropouts) == {0.25}


def test_attention_is_turned_off_by_naming_no_level(do):
    do("--method ddpm --steps 1 --attention")
    method, _ = checkpoint.load("runs/ddpm", device="cpu")
    assert not any(isinstance(module, Attention) for module in method.modules())


@pytest.mark.parametrize(
    "line, word",
    [
        ("", "patch_diffusion"),
        ("--help", "patch_diffusion"),
        ("--method pdm --help", "--patch"),
        ("--method iddpm --help", "--objective"),
        ("--method ddpm --help", "--width N"),
    ],
)
def test_help_lists_the_methods_and_the_flags_of_each(command, line, word):
    code, out, err = command(line)
    assert code == 0
    assert not err
    assert word in out.replace("--width int", "--width N")


# What a user does wrong

@pytest.mark.parametrize(
    "line, word",
    [
        ("--method pdm --data nowhere", "nowhere"),
        ("--method pdm --patch 5 --size 16 --mults 1 1", "--size 10 or 20"),
        ("--method pdm --patch 0", "patch"),
        ("--method ddpm --mults 1 1 1 1 1 1", "--size 32"),
        ("--method ddpm --mults 1 1 1 1 1 1 1 1 1 1 1 1 1", "1 to 12 levels"),
        ("--method ddpm --width 2 --mults 0.0156", "--mults"),
        ("--method ddpm --width 3 --mults 0.25", "no channels"),
        ("--method ddpm --width 100000", "parameters"),
        ("--method pdm --steps 0", "--steps"),
        ("--method pdm --steps 100000000000000000000", "--steps"),
        ("--method pdm --batch 0", "--batch"),
        ("--method pdm --steps few", "few"),
        ("--method ddpm --patch 4", "--patch belongs to pdm, not to ddpm"),
        ("--method dppm", "pdm"),
        ("--steps 3", "choose a method"),
        ("pdm --steps 3", "did you mean --method pdm?"),
        ("--method pdm edm", "did you mean --method edm?"),
        ("--method edm --precond ddim", "ddim"),
        ("--method patch_diffusion --p_full 2", "--p_full"),
        ("--method patch_diffusion --size 20 --mults 1 1", "--size 16 or 24"),
        ("--method edm --p_full 1", "--p_full belongs to patch_diffusion"),
        ("--method edm --augment 2", "--augment"),
        ("--method pdm --stps 4", "did you mean --steps?"),
        ("--method pdm --learning-rate 4", "did you mean --lr?"),
        ("--method pdm --conditional --data plain.npy", "classes"),
        ("--method pdm --accumulate 3", "must divide --batch 4"),
        ("--method pdm --device quantum", "quantum"),
        ("--method pdm --device meta", "meta"),
        ("--method pdm --resume", "ckpt.pt"),
        ("--method pdm --predict noise", "noise"),
        ("--method pdm --data digits --flip", "mirror"),
        ("--method ddpm --T 10", "larger T"),
        ("--method pdm --size 16 16 16", "size"),
        ("--method pdm --size 1000000", "--size"),
        ("--method pdm --attention 4", "--attention"),
        ("--method pdm --width 0", "--width"),
        ("--method pdm --mults", "--mults"),
        ("--method pdm extra", "extra"),
        ("--method pdm --lr -1", "--lr"),
        ("--method pdm --lr nan", "--lr"),
        ("--method pdm --ema 2", "--ema"),
        ("--method pdm --channels 2", "channels"),
        ("--method pdm --overfit -1", "--overfit"),
    ],
)
def test_a_mistake_is_one_error_line_and_writes_nothing(command, tmp_path, line, word):
    np.save("plain.npy", np.zeros((8, 3, 8, 8), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    small = "" if line.startswith("pdm") else f"{SMALL} --attention 0 --steps 2"
    code, _, err = command(f"{small} {line}")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert word in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_the_first_step(do, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, _, err = do("--method pdm --steps 1")
    assert code == 2
    assert "the disk has 0 MB left" in err
    assert not os.path.exists("runs")


def test_the_command_itself_prints_one_line_and_exits_with_2(tmp_path):
    line = [sys.executable, HERE.parent / "train.py", "--method", "pdm", "--data", "nowhere"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no such file or folder: nowhere\n"
