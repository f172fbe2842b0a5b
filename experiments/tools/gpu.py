"""What only a GPU can tell, measured in parts of at most ten minutes on an H100:

    python experiments/tools/gpu.py --part parity first --out gpu
    python experiments/tools/gpu.py --part cifar --data cifar-10-binary.tar.gz --out gpu
    python experiments/tools/gpu.py --tiny --device cpu --out rehearsal

    parity     the tests that compare CUDA with the CPU
    first      the README's first command; PDM at 64x64, 128x128 and 256x256
    speed      training steps in each precision, eager and compiled, and of other projects
    sampling   PDM with and without patches, Heun's sampler against the chain
    cifar      EDM and PDM on CIFAR-10; each call goes on with the training of the one before
    faults     resume, Ctrl-C, too little memory, two processes, crops that change when compiled

Each part writes OUT/<part>.json and .txt after each measurement, pictures and logs beside. One
that fails is written down; the same command measures again what failed and what is missing.
"""
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.report import machine
from experiments.tools import gpu_parts as parts
from experiments.tools.gpu_tools import Report
from experiments.tools.peers import PEERS
from plumbing import device as devices
from plumbing.checkpoint import METHODS
from plumbing.drawing import check_range, make_folder
from plumbing.flags import UserError, run, script

CIFAR = {
    "edm": "--method edm --P_mean -1.2 --augment 0.12 --mults 1 2 2 2 --attention 1 2",
    "pdm": "--method pdm --patch 2 --mults 1 2 2 --attention 1",
}


class Numbers(NamedTuple):
    """How much is measured."""

    net: str = ""  # flags of the network and the chain for every training
    first: str = ""  # more of the README's first command
    drawn: str = ""  # and of its second one
    sizes: tuple = (64, 128, 256)  # of PDM's images
    steps: int = 1000  # of each training of `first`
    size: int = 32  # of images whose training step is timed
    batches: tuple = (256, 64, 128, 512, 1024)  # the first one in all precisions
    widths: tuple = (64, 128)
    count: int = 20  # steps in one timing
    sampled: tuple = ((64, 256), (256, 32))  # size and batch of sampling's speed
    chain: int = 50  # steps of it
    n: int = 2000  # images for a Frechet distance
    digits: int = 3000  # steps of the digits' training
    cifar: str = (
        "--width 128 --blocks 2 --batch 512 --lr 1e-3 --decay 0 --flip --dropout 0.1 "
        "--no-compile"  # which takes a minute of each call
    )
    every: int = 1000  # steps of it between checkpoints
    epochs: int = 15  # of CIFAR-10's features
    short: int = 40  # steps of the trainings of `faults`
    too_large: str = "--batch 1000000 --size 64"  # must end with one line
    halved: tuple = (512, 512)  # images, and their size, that no GPU holds at once


TINY = Numbers(
    net="--width 8 --mults 1 --attention 0 --grid 1 --batch 4",
    first="--steps 2 --width 8 --mults 1 --attention --grid 1 --batch 4 --size 8 --T 22",
    drawn="--n 1",
    sizes=(16,),
    steps=2,
    size=16,
    batches=(4, 8),
    widths=(8,),
    count=1,
    sampled=((16, 2),),
    chain=3,
    n=70,
    digits=2,
    cifar="--size 16 --width 8 --batch 4",
    every=5,
    epochs=1,
    short=2,
    too_large="--batch 7 --accumulate 2",
    halved=(4, 8),
)


def gpu(
    *,
    part: tuple[str, ...] = (),  # parity first speed sampling cifar faults; default all
    tiny: bool = False,  # a rehearsal with tiny numbers, which a CPU can do
    whole_suite: bool = False,  # parity runs all tests, not those of CUDA alone
    data: str | None = None,  # CIFAR-10 for the part cifar, as train.py takes it
    minutes: float = 5,  # of training in one call of the part cifar
    limit: float = 9,  # minutes after which a part begins no more measurements
    out: str = "runs/gpu",  # folder of all that is written
    device: str | None = None,  # cuda, mps or cpu
):
    """Measure part after part."""
    if set(part) - PARTS.keys():
        raise UserError(f"--part takes some of {', '.join(PARTS)}")
    check_range("minutes", minutes, 1e-3, 1000)
    check_range("limit", limit, 1e-3, 1000)
    device = devices.pick(device)
    folder = Path(out).absolute()
    make_folder(folder)
    numbers = TINY if tiny else Numbers()
    about = f"{machine()}, {device.type}, torch {torch.__version__}, tiny: {tiny}"
    reports = {name: Report(folder, name, about) for name in part or PARTS}
    options = dict(parity=[whole_suite], cifar=[data, minutes])
    for name, report in reports.items():
        report.begin(limit)
        PARTS[name](report, numbers, device, *options.get(name, []))
        print(f"wrote {report.path} and .txt")


# The parts


def parity(report, numbers, device, whole_suite):
    chosen = ["tests"] if whole_suite else ["tests/test_cuda.py"]
    report.measure(" ".join(chosen), parts.pytest, report, chosen)


def first(report, numbers, device):
    report.measure("the README's command", parts.first_command, report, numbers, device)
    for size in numbers.sizes:
        report.measure(f"PDM {size}x{size}", parts.pdm_at, size, report, numbers, device)


def speed(report, numbers, device):
    def measure(method, precision="bf16", layout="channels_last", compile="no", **sizes):
        """sizes: batch and width; default the first ones."""
        batch = sizes.get("batch", numbers.batches[0])
        width = sizes.get("width", numbers.widths[0])
        how = "compiled" if compile == "yes" else "eager"
        what = f"{method} {precision} {layout} {how}, batch {batch}, width {width}"
        case = parts.speed_case(method, numbers.size, batch, width, precision, compile)
        report.measure(what, parts.step_speed, case, layout, device, numbers.count)

    for method, precision in itertools.product(METHODS, ("fp32", "tf32", "bf16")):
        measure(method, precision)
    for method, width in itertools.product(("ddpm", "pdm"), numbers.widths):
        for batch in numbers.batches:
            measure(method, batch=batch, width=width)
    for method in METHODS:
        measure(method, layout="contiguous")
    for precision, width, name in itertools.product(("fp32", "bf16"), numbers.widths, PEERS):
        batch = numbers.batches[0]
        sizes = (numbers.size, batch, width)
        case = parts.speed_case("ddpm", *sizes, precision, "no", (1, 2, 2, 2))
        what = f"ddpm against {name}, {precision}, batch {batch}, width {width}"
        report.measure(what, parts.against, name, case, device, numbers.count, 3)
    for method in METHODS:
        measure(method, compile="yes")
    measure("ddpm", layout="contiguous", compile="yes")
    measure("ddpm", "tf32", compile="yes")


def sampling(report, numbers, device):
    grid = itertools.product(numbers.sampled, (4, 1), ("fp32", "bf16"))
    for (size, batch), P, precision in grid:
        what = f"P = {P}, {size}x{size}, {precision}, batch {batch}, {numbers.chain} steps"
        given = (P, size, batch, precision, numbers, device)
        report.measure(what, parts.pdm_speed, *given)
    report.measure("samplers on digits", parts.samplers, report, numbers, device)


def cifar(report, numbers, device, data, minutes):
    if data is None or not Path(data).exists():
        print(f"cifar: left out, there is no --data {data}")
        return
    seconds = 60 * minutes / len(CIFAR)
    for name, flags in CIFAR.items():
        call = 1 + sum(row["what"].startswith(f"{name},") for row in report.rows)
        given = (name, flags, Path(data).absolute(), seconds, report, numbers, device)
        report.measure(f"{name}, call {call}", parts.cifar_call, *given)


def faults(report, numbers, device):
    given = (report, numbers, device)
    report.measure("Ctrl-C", parts.interrupted, *given)
    report.measure("too large a batch", parts.too_large, *given)
    report.measure("batches that sampling halves", parts.halved, *given)
    report.measure("two processes on one device", parts.two_processes, *given)
    for name in METHODS:
        report.measure(f"{name}, resumed", parts.resumed, name, *given)
    report.measure("crops that change, compiled", parts.compiled_crops, *given)


PARTS = dict(
    parity=parity, first=first, speed=speed, sampling=sampling, cifar=cifar, faults=faults
)
main = script(gpu, __doc__)

if __name__ == "__main__":
    run(main)
