"""Seconds and memory of PDM's steps by patch size, on untrained networks.

As a program, python experiments/costs.py P SIZE BATCH, it prints the megabytes that a sampling
step needs on a CPU (Linux): a process of its own is the only fair scale.
"""
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from plumbing import checkpoint
from plumbing import device as devices
from plumbing.flags import UserError, flags_of
from unet import UNet

# Linux's account of this process: writing 5 to CLEAR starts its high-water mark anew
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class Cost(NamedTuple):
    train: float | None  # seconds of loss and backward pass; None where it was left out
    sample: float  # milliseconds of a sampling step, for each image
    megabytes: float  # that a sampling step needs at its peak

    def columns(self, first):
        """For a table; `first` is the cost that others are compared with."""
        return dict(
            train_step_s=self.train,
            sample_step_ms_an_image=round(self.sample, 3),
            speedup=round(first.sample / self.sample, 2),
            peak_mb=round(self.megabytes, 1),
            memory_ratio=round(self.megabytes / first.megabytes, 3),
        )


def network(P, size, device):
    defaults = {name: parameter.default for name, parameter in flags_of(UNet).items()}
    config = defaults | dict(patch=(P,))
    about = dict(method="pdm", config=config, shape=[3, size, size], classes=[])
    return devices.to_device(checkpoint.build(about), device)


def costs_of(size, patches, batch, repeats, device):
    """{P: Cost}; timed in turns, so that all see the same machine, and medians count."""
    methods = {P: network(P, size, device) for P in patches}
    x = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    training = {P: [] for P in patches}
    sampling = {P: [] for P in patches}
    for _ in range(repeats):
        for P, method in methods.items():
            if size <= 64 or P >= 4:
                training[P].append(seconds_of(train_step, method, x))
            sampling[P].append(seconds_of(two_steps, method, x) / 2)
    costs = {}
    for P in patches:
        train = round(statistics.median(training[P]), 4) if training[P] else None
        sample = 1000 * statistics.median(sampling[P]) / batch
        costs[P] = Cost(train, sample, peak(P, size, batch, device))
    return costs


def train_step(method, x):
    method.loss(x).backward()


def two_steps(method, x):
    for _ in method.sample(x, steps=2):
        pass


def seconds_of(function, method, x):
    start = time.perf_counter()
    function(method, x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Memory


def peak(P, size, batch, device):
    """Megabytes that a sampling step needs at once beyond the weights and the images."""
    if device.type != "cuda":
        return peak_of_a_process(P, size, batch)
    method = network(P, size, device)
    x = torch.rand(batch, 3, size, size, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    two_steps(method, x)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_of_a_process(P, size, batch):
    if not CLEAR.exists():
        return math.nan
    line = [sys.executable, __file__, str(P), str(size), str(batch)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise UserError(f"weighing P = {P} failed: {reason}")
    return float(done.stdout)


def weigh(P, size, batch):
    """Megabytes by which this process grows at most during a sampling step."""
    torch.set_num_threads(1)
    method = network(P, size, torch.device("cpu"))
    x = torch.rand(batch, 3, size, size)
    two_steps(method, x[:1])  # whatever is set up once
    CLEAR.write_text("5")
    before = kilobytes("VmRSS")
    two_steps(method, x)
    return (kilobytes("VmHWM") - before) / 1e3


def kilobytes(key):
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(key)]
    return int(lines[0].split()[1])


if __name__ == "__main__":
    print(weigh(*map(int, sys.argv[1:])))
