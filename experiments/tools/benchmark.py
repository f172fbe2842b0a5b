"""How fast is it?   python experiments/tools/benchmark.py

Times train.py itself, a plain reference step (the same network and loss in thirty ordinary
lines: eager, fp32, no trick) and, where they are installed, what people use instead; in turns,
so that all see the same machine, and gives medians. Writes benchmark.txt and benchmark.json.

    python experiments/tools/benchmark.py --methods ddpm pdm edm --precision fp32 bf16
    python experiments/tools/benchmark.py --growth       # how cost grows, as exponents
    python experiments/tools/benchmark.py --peers --methods ddpm --width 64 --mults 1 2 2 2

--peers needs pip install denoising-diffusion-pytorch diffusers.
"""
import functools
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import train
from edm import denoiser
from experiments.common import check_counts
from experiments.tools import timers
from experiments.tools.peers import PEERS, check_peers
from plumbing import checkpoint
from plumbing import device as devices
from plumbing.checkpoint import METHODS, SMALL_RUN
from plumbing.drawing import make_folder
from plumbing.flags import UserError, flags_of, run, script
from unet import UNet

GROWTH = {
    "batch": (4, 8, 16, 32, 64),
    "size": (16, 32, 64),
    "width": (16, 32, 64, 128),
}


class Case(NamedTuple):
    """What is timed in one row."""

    method: str
    size: int
    batch: int
    precision: str
    compile: str
    config: dict  # {flag: value}

    def shape(self):
        return (3, self.size, self.size)

    def about(self):
        """As checkpoint.build takes it."""
        shape = list(self.shape())
        return dict(method=self.method, config=self.config, shape=shape, classes=[])

    def words(self):
        """The same as train.py's command line."""
        words = ["--method", self.method, "--batch", str(self.batch)]
        words += ["--precision", self.precision, "--width", str(self.config["width"])]
        words += ["--mults", *map(str, self.config["mults"])]
        if self.config["attention"]:
            words += ["--attention", *map(str, self.config["attention"])]
        if self.compile == "yes":
            words.append("--compile")
        if "p_full" in self.config:
            words += ["--p_full", "1"]
        return words


def benchmark(
    *,
    methods: tuple[str, ...] = ("ddpm", "pdm", "edm"),  # methods to time
    size: tuple[int, ...] = (32,),  # image sizes
    batch: tuple[int, ...] = (32,),  # images a step
    width: int | None = None,  # of the U-Net; default the method's
    mults: tuple[float, ...] = (),  # of the U-Net; default the method's
    attention: tuple[int, ...] = (),  # of the U-Net; default the method's, or the last level
    precision: tuple[str, ...] = ("fp32",),  # fp32, bf16
    compile: tuple[str, ...] = ("no",),  # no, yes
    steps: int = 8,  # steps in one timing
    repeats: int = 5,  # timings of each, in turns; the median counts
    peers: bool = False,  # time denoising-diffusion-pytorch and diffusers too
    growth: bool = False,  # vary batch, size and width one at a time, and give the exponents
    threads: int = 0,  # CPU threads; 0 as many as torch takes
    device: str | None = None,  # cuda, mps or cpu
    out: str = "runs/benchmark",  # folder for benchmark.txt and benchmark.json
):
    """Time, print and write the table. UserError for what cannot be."""
    if set(methods) - METHODS.keys():
        raise UserError(f"--methods are some of {', '.join(METHODS)}")
    if set(precision) - {"fp32", "bf16"} or set(compile) - {"no", "yes"}:
        raise UserError("--precision takes fp32 and bf16, --compile no and yes")
    check_counts(1, size=size, batch=batch, steps=steps, repeats=repeats)
    check_counts(0, threads=threads)
    if peers:
        check_peers()
    out = Path(out)
    make_folder(out)
    torch.set_num_threads(threads or torch.get_num_threads())
    device = devices.pick(device)
    network = dict(width=width, mults=mults, attention=attention)
    if growth:
        cases = growing(methods[0], mults, attention)
    else:
        grid = itertools.product(methods, size, batch, precision, compile)
        cases = [Case(*which, config_of(which[0], **network)) for which in grid]
    for case in cases:
        checkpoint.build(case.about(), "meta")

    timed = [timers_of(case, device, peers) for case in cases]
    found = in_turns(timed, steps, repeats)
    best = peak(device)
    rows = []
    for case, of_case, speeds in zip(cases, timed, found):
        rows.append(row_of(case, speeds, best, device) | compared(case, of_case, speeds))
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"{where}, fp32 peak {best / 1e9:.0f} GFLOP/s, medians of {repeats}"]
    lines += [" | ".join(map(str, line)) for line in (rows[0], *(r.values() for r in rows))]
    if growth:
        lines += exponents(rows)
    text = "\n".join(lines)
    (out / "benchmark.txt").write_text(text + "\n")
    (out / "benchmark.json").write_text(json.dumps(rows, indent=1))
    print(f"{text}\nwrote {out / 'benchmark.txt'} and benchmark.json")


def config_of(method, width=None, mults=(), attention=()):
    """Every flag of a method's default run, with another U-Net where one is asked for.

    Of a method that trains on crops whole images are timed.
    """
    config = {}
    for function in (METHODS[method], UNet, train.train):
        config |= {name: parameter.default for name, parameter in flags_of(function).items()}
    config |= SMALL_RUN.get(method, {})
    asked = dict(width=width, mults=mults, attention=attention)
    config |= {name: value for name, value in asked.items() if value}
    if not attention:
        last = len(config["mults"]) - 1
        config["attention"] = tuple(min(level, last) for level in config["attention"])
    if "p_full" in config:
        config["p_full"] = 1.0
    return config


def growing(method, mults, attention):
    """Cases of which each but the first group changes one thing."""
    base = dict(batch=16, size=32, width=32)
    cases = []
    for name, values in GROWTH.items():
        for value in values:
            of = base | {name: value}
            config = config_of(method, of["width"], mults, attention)
            cases.append(Case(method, of["size"], of["batch"], "fp32", "no", config))
    return cases


# Timing


def timers_of(case, device, peers):
    """{name: function of a number of steps, which gives images a second}."""
    sampling = timers.Sampling(case, device)
    functions = {
        "ours": functools.partial(timers.train_py, case, device),
        "reference": functools.partial(timers.reference_step, case, device),
        "sampling": sampling.sampler,
        "network": sampling.network,
    }
    if peers:
        functions |= {name: timers.PeerStep(name, case, device) for name in PEERS}
    return functions


def in_turns(timed, steps, repeats):
    """[{name: [images a second, ...]}, ...] of each case; all are timed before any again."""
    found = [{name: [] for name in of_case} for of_case in timed]
    for _ in range(repeats):
        for of_case, speeds in zip(timed, found):
            for name, timer in of_case.items():
                speeds[name].append(timer(steps))
    return found


# The table


def row_of(case, speeds, best, device):
    """What the table says of a case, from its speeds {name: [images a second, ...]}."""
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ours = median["ours"]
    flops = count_flops(case)
    row = dict(
        method=case.method,
        size=case.size,
        batch=case.batch,
        width=case.config["width"],
        precision=case.precision,
        compile=case.compile,
        images_per_s=ours,
        ratio=ours / median["reference"],
        spread=max(speeds["ours"]) / min(speeds["ours"]),
        gflop=flops / 1e9,
        share_of_peak=3 * flops * ours / best,
        sampled_per_s=median["sampling"],
        sampling_overhead=median["network"] / median["sampling"] - 1,
        memory_mb=memory(case, device),
    )
    return rounded(row)


def compared(case, of_case, speeds):
    """Ours over each peer: in images a second, and in arithmetic, as no two networks agree."""
    row = {}
    ours = statistics.median(speeds["ours"])
    for name in PEERS:
        if name in speeds:
            times = ours / statistics.median(speeds[name])
            row[f"times_{name}"] = times
            row[f"arithmetic_{name}"] = times * count_flops(case) / of_case[name].flops
    return rounded(row)


def rounded(row):
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


def exponents(rows):
    """Lines that say how cost grows with batch, size and width."""
    lines = []
    start = 0
    for name, values in GROWTH.items():
        group = rows[start : start + len(values)]
        start += len(values)
        costs = {
            "step time": [row["batch"] / row["images_per_s"] for row in group],
            "memory": [row["memory_mb"] for row in group],
            "arithmetic": [row["gflop"] * row["batch"] for row in group],
        }
        for what, cost in costs.items():
            slope, _ = np.polyfit(np.log(values), np.log(np.maximum(cost, 1e-3)), 1)
            lines.append(f"{what} grows as {name}^{slope:.2f}")
    return lines


def peak(device, dtype=torch.float32):
    """FLOP/s of a large matrix product, the best of five."""
    side = 512 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = timers.clock(device)
        a @ a
        best = min(best, timers.clock(device) - start)
    return 2 * side**3 / best


def count_flops(case):
    """Of one image's way forward; a training step takes three times as many."""
    D = denoiser(checkpoint.build(case.about()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        D(torch.zeros(1, *case.shape()), 1.0)
    return counter.get_total_flops()


def memory(case, device):
    """Megabytes that a training step takes beyond weights and images, at its peak.

    On a CPU what its tensors kept for the backward pass weigh.
    """
    method = devices.to_device(checkpoint.build(case.about()), device)
    x = torch.zeros(case.batch, *case.shape(), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.loss(x).backward()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    scale = Scale()
    with torch.autograd.graph.saved_tensors_hooks(scale.put, scale.take):
        method.loss(x)
    for weight in method.parameters():
        scale.sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(scale.sizes.values()) / 1e6


class Scale:
    """Weighs the memory of tensors that are put on it, each once."""

    def __init__(self):
        self.sizes = {}

    def put(self, tensor):
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def take(self, tensor):
        return tensor


main = script(benchmark, __doc__)

if __name__ == "__main__":
    run(main)
