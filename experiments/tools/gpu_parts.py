"""What each part of gpu.py measures: functions that return a row, {column: value}."""
import functools
import importlib.util
import shutil
import signal
import socket
import statistics
import time

import numpy as np
import torch
from torch._dynamo.utils import counters

import sample
import train
from experiments import costs
from experiments.common import Setup, train_once
from experiments.judge import Judge, case_of, compare
from experiments.report import read_table
from experiments.tools import features, timers
from experiments.tools.benchmark import Case, config_of, count_flops, in_turns
from experiments.tools.gpu_tools import (
    ROOT,
    finish,
    idle_share,
    last_line,
    must_be,
    peak_of,
    quiet,
    rounding,
    run_for,
    start,
    trained,
    watched,
)
from experiments.tools.peers import PEERS
from plumbing import checkpoint, drawing
from plumbing import device as devices
from plumbing.digits import digits
from plumbing.drawing import last

TWO_PROCESSES = (
    "import sys, torch, train; torch.distributed.init_process_group('gloo'); "
    "train.main(sys.argv[1:])"
)


# parity


def pytest(report, chosen):
    log = report.log("pytest")
    process = start(["-m", "pytest", "-rs", *chosen], log)
    code = finish(process, report.seconds_left())
    return dict(exit_code=code, result=last_line(log))


# first


def first_command(report, numbers, device):
    """Seconds of the README's first two commands, each a process of its own."""
    folder = report.new_folder("readme")
    log = report.log("readme")
    where = ["--device", device.type]
    training = [ROOT / "train.py", *f"--method pdm --patch 4 {numbers.first}".split(), *where]
    sampling = [ROOT / "sample.py", "runs/pdm", *numbers.drawn.split(), *where]
    row = {}
    for name, words in dict(train=training, sample=sampling).items():
        begun = time.time()
        code = finish(start(words, log, folder), report.seconds_left())
        must_be(code, [0], log)
        row[f"{name}_s"] = time.time() - begun
    (picture,) = folder.glob("runs/pdm/samples/step*.png")
    shutil.copy(picture, report.out / "first-readme.png")
    end = read_table(folder / "runs/pdm/log.csv")[-1]
    return row | dict(images_per_s=float(end["images_per_s"]), rmse_1=float(end["rmse_1"]))


def pdm_at(size, report, numbers, device):
    """PDM on 2,000 digits of this size: training, then a picture."""
    data = report.out / f"digits-{size}.npy"
    if not data.exists():
        x, _ = digits((size, size), count=2000)
        np.save(data, x.permute(0, 2, 3, 1).numpy())
    folder = report.new_folder(f"pdm-{size}")
    log = report.log(f"pdm-{size}")
    length = f"--steps {numbers.steps} --every {numbers.steps // 2}"
    line = f"--method pdm --patch 4 {length} {numbers.net}"
    row = trained(line, folder, log, device, data)
    picture = report.out / f"first-pdm-{size}.png"
    words = [str(folder), "--n", "16", "--out", str(picture), "--device", device.type]
    with quiet(log), watched(device) as watch:
        sample.main(words)
    return row | dict(draw_16_s=watch["seconds"], draw_16_mb=watch["memory_mb"])


# speed


class Step:
    """train.py's step, eager or compiled, on images that lie on the device."""

    def __init__(self, case, layout, device):
        method = checkpoint.build(case.about())
        if layout == "channels_last":
            self.method = devices.to_device(method, device)
        else:
            self.method = method.to(device)
        if case.compile == "yes":
            torch._dynamo.reset()
            self.method.net.compile()
        self.weights = list(self.method.parameters())
        self.averages = [weight.detach().clone() for weight in self.weights]
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.weights, 1e-4, fused=fused)
        self.x = torch.rand(case.batch, *case.shape(), device=device) * 2 - 1
        self.autocast = devices.autocast(device, "bf16" if case.precision == "bf16" else "fp32")
        self.device = device

    def steps(self, count):
        for _ in range(count):
            with self.autocast:
                loss = self.method.loss(self.x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            train.update_average(self.averages, self.weights, 0.999)

    def speed(self, count):
        """Images a second."""
        start = timers.clock(self.device)
        self.steps(count)
        return len(self.x) * count / (timers.clock(self.device) - start)


def speed_case(method, size, batch, width, precision="bf16", compile="no", mults=()):
    return Case(method, size, batch, precision, compile, config_of(method, width, mults))


def step_speed(case, layout, device, count):
    """Images a second of training, share of the arithmetic's floor, idle share, memory."""
    keys = ("images_per_s", "share_of_peak", "idle", "memory_mb", "first_step_s")
    if case.precision == "tf32" and device.type == "cpu":
        return dict.fromkeys(keys)
    with rounding(case.precision), watched(device) as watch:
        step = Step(case, layout, device)
        first = case.batch / step.speed(1)
        step.steps(2)
        speed = step.speed(count)
        idle = None
        if device.type == "cuda":
            seconds = case.batch * count / speed
            idle = idle_share(functools.partial(step.steps, count), seconds)
    share = 3 * count_flops(case) * speed / peak_of(device, case.precision)
    return dict(zip(keys, (speed, share, idle, watch["memory_mb"], first)))


def against(name, case, device, count, repeats):
    """Ours and another project's training, in turns; medians of images a second."""
    if importlib.util.find_spec(PEERS[name]) is None:
        return dict(note=f"{name} is not installed")
    ours = Step(case, "channels_last", device)
    theirs = timers.PeerStep(name, case, device)
    ours.steps(3)
    (speeds,) = in_turns([dict(ours=ours.speed, theirs=theirs)], count, repeats)
    row = {key: statistics.median(values) for key, values in speeds.items()}
    times = row["ours"] / row["theirs"]
    return row | dict(times=times, arithmetic=times * count_flops(case) / theirs.flops)


# sampling


@torch.no_grad()
def chain_speed(method, shape, batch, steps, precision, device):
    """Images a second of a method's own sampler in so many steps."""
    x = torch.randn(batch, *shape, device=device)
    method = method.eval()
    with devices.autocast(device, precision):
        last(method.sample(x, steps=2))
        with watched(device) as row:
            last(method.sample(x, steps=steps))
    return dict(images_per_s=batch / row["seconds"]) | row


def pdm_speed(P, size, batch, precision, numbers, device):
    method = costs.network(P, size, device)
    return chain_speed(method, (3, size, size), batch, numbers.chain, precision, device)


def samplers(report, numbers, device):
    """Frechet distance and images a second of the chain, DDIM and Heun, on one network."""
    out = report.out / "sampling-digits"
    setup = Setup(out, "digits", numbers.size, numbers.digits, numbers.n, None, device.type)
    with quiet(report.log("digits")):
        path = train_once(setup, "pdm", f"--method pdm --patch 4 {numbers.first}")
        table = features_of("digits", numbers.size, 3, out / "features.pt", device)
        judge = Judge(path, table, numbers.n, device=device.type)
        few = min(50, judge.method.T)
        cases = [
            case_of([judge], "chain", judge.method.T, "own"),
            case_of([judge], "chain", few, "own"),
            case_of([judge], "DDIM", few, "own", eta=0.0),
            case_of([judge], "Heun", 18, "heun"),
        ]
        found = compare(cases, report.out / "sampling-digits.csv", "evaluations")
    row = {}
    for (name, steps), drawn in found.items():
        row[f"{name} {steps}, images_per_s"] = 1 / drawn.seconds
        row[f"{name} {steps}, frechet"] = drawn.frechet
    return row


def features_of(data, size, epochs, path, device):
    """The path of a classifier's features, trained where it is not there yet."""
    if not path.exists():
        line = f"--size {size} --epochs {epochs} --device {device.type}"
        features.main(["--data", str(data), *line.split(), "--out", str(path)])
    return str(path)


# cifar


def cifar_call(name, flags, data, seconds, report, numbers, device):
    """Train so many seconds more, then measure what has been learned until now."""
    folder = report.out / f"cifar-{name}"
    log = report.log(name)
    line = f"{flags} {numbers.cifar} --conditional --steps 1000000 --every {numbers.every}"
    words = [ROOT / "train.py", *line.split(), "--data", data, "--out", folder]
    words += ["--device", device.type]
    if (folder / "ckpt.pt").exists():
        words.append("--resume")
    must_be(run_for(seconds, words, log), [0, 130], log)
    saved = checkpoint.read(folder)
    row = dict(step=saved["step"], images=saved["images"], train_s=saved["seconds"])
    row["images_per_s"] = saved["images"] / saved["seconds"]
    size = saved["shape"][1]
    with quiet(log):
        path = features_of(data, size, numbers.epochs, report.out / "features.pt", device)
        judge = Judge(folder, path, numbers.n, device=device.type)
        drawn = judge.draw(judge.chain("heun", steps=18))
        picture = report.out / f"cifar-{name}-{saved['step']:07d}.png"
        grid = f"--class all --guidance 2 --sampler heun --device {device.type}"
        sample.main([str(folder), *grid.split(), "--out", str(picture)])
    return row | dict(frechet=drawn.frechet, drawn_per_s=1 / drawn.seconds)


# faults


def resumed(name, report, numbers, device):
    """Weights of a resumed run against those of one that never stopped, and of its twin."""
    folder = report.new_folder(f"resume-{name}")
    log = report.log("resume")
    half = numbers.short
    line = f"--method {name} --size {numbers.size} --every {half} {numbers.net}"
    for run in ("whole", "twin"):
        trained(f"{line} --steps {2 * half}", folder / run, log, device)
    trained(f"{line} --steps {half}", folder / "parts", log, device)
    trained(f"{line} --steps {2 * half} --resume", folder / "parts", log, device)
    return dict(
        resumed_apart=largest_difference(folder / "whole", folder / "parts"),
        twins_apart=largest_difference(folder / "whole", folder / "twin"),
    )


def largest_difference(run, other):
    """Of the weights of two runs; 0 where they are bit-equal."""
    a, b = (checkpoint.read(folder)["model"] for folder in (run, other))
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def interrupted(report, numbers, device):
    """Ctrl-C in the middle of training must save, and --resume go on."""
    folder = report.new_folder("ctrl-c")
    log = report.log("ctrl-c")
    line = f"--method ddpm --size {numbers.size} {numbers.net} --device {device.type}"
    words = [ROOT / "train.py", *line.split(), "--out", folder]
    process = start([*words, "--steps", 19_999, "--every", 19_999], log)
    until = time.time() + 120
    while not (folder / "ckpt.lock").exists() and time.time() < until:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    code = finish(process, 60)
    step = checkpoint.read(folder)["step"]
    resume = start([*words, "--resume", "--steps", step + 2, "--every", step + 2], log)
    return dict(exit_code=code, saved_at_step=step, resume_exit_code=finish(resume, 120))


def too_large(report, numbers, device):
    """A batch that cannot be must end with exit code 2 and one line."""
    log = report.log("too-large")
    line = f"--method ddpm {numbers.too_large} --device {device.type}"
    words = [ROOT / "train.py", *line.split(), "--out", report.new_folder("too-large")]
    code = finish(start(words, log), report.seconds_left())
    text = log.read_text(encoding="utf-8")
    return dict(exit_code=code, tracebacks=text.count("Traceback"), line=last_line(log))


def halved(report, numbers, device):
    """Sizes of the batches in which drawing ends, where all at once do not fit."""
    count, size = numbers.halved
    method = checkpoint.build(speed_case("ddpm", size, 1, numbers.widths[0]).about())
    method = devices.to_device(method, device).eval().requires_grad_(False)
    sizes = []

    def chain(noise, y, randn_like):
        sizes.append(len(noise))
        return method.sample(noise, y, steps=2, randn_like=randn_like)

    keys = [(0, i) for i in range(count)]
    with quiet(report.log("halved")), watched(device) as row:
        x = drawing.draw(chain, (3, size, size), keys, count, None, device)
    return row | dict(drawn=len(x), batches=" ".join(map(str, sizes)))


def two_processes(report, numbers, device):
    """Two processes on one GPU against --accumulate 2. They exchange by gloo, not nccl.

    nccl wants a GPU for each.
    """
    folder = report.new_folder("two")
    log = report.log("two")
    length = f"--steps {numbers.short} --every {numbers.short}"
    line = f"--method ddpm --size {numbers.size} {length} {numbers.net} --precision fp32"
    trained(f"{line} --accumulate 2", folder / "one", log, device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    shared |= dict(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    words = ["-c", TWO_PROCESSES, *line.split(), "--device", device.type]
    words += ["--out", folder / "two"]
    first, second = (start(words, log, RANK=rank, **shared) for rank in "01")
    try:
        code = finish(first, 180)
    finally:
        other_code = finish(second, 10)
    must_be(max(code, other_code), [0], log)
    return dict(apart=largest_difference(folder / "one", folder / "two"))


def compiled_crops(report, numbers, device):
    """Patch Diffusion, whose crops change in size, eager and compiled."""
    folder = report.new_folder("crops")
    log = report.log("crops")
    length = f"--steps {4 * numbers.short} --every {2 * numbers.short}"
    size = max(16, numbers.size)
    line = f"--method patch_diffusion {length} {numbers.net} --size {size}"
    eager = trained(f"{line} --no-compile", folder / "eager", log, device)
    torch._dynamo.reset()
    counters.clear()
    compiled = trained(f"{line} --compile", folder / "compiled", log, device)
    return dict(
        eager_images_per_s=eager["images_per_s"],
        compiled_images_per_s=compiled["images_per_s"],
        compile_s=compiled["seconds"] - eager["seconds"],
        graphs=counters["stats"]["unique_graphs"],
        apart=largest_difference(folder / "eager", folder / "compiled"),
    )
