"""What benchmark.py times: train.py itself, a plain step, sampling, and other projects' steps.

Each is called with a number of steps and gives images a second.
"""
import contextlib
import csv
import io
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import train
from edm import denoiser
from experiments.tools.peers import peer_loss, peer_net
from plumbing import checkpoint
from plumbing import device as devices
from plumbing.device import seeded_noise

IMAGES = 256  # in the set that is trained on


def clock(device):
    """Seconds, once the device has done all that was asked of it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def train_py(case, device, steps):
    """What train.py itself reports, after its first steps."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, 3, case.size, case.size), np.uint8)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        np.save(f"{folder}/x.npy", images)
        words = ["--data", f"{folder}/x.npy", "--out", f"{folder}/run", "--device", str(device)]
        length = f"--steps {2 * steps} --every {steps} --grid 1"
        train.main([*case.words(), *length.split(), *words])
        log = Path(folder, "run", "log.csv").read_text()
    rows = list(csv.DictReader(log.splitlines()))
    return float(rows[-1]["images_per_s"])


def reference_step(case, device, steps):
    """The step as most would write it: eager, fp32, no trick."""
    method = checkpoint.build(case.about()).to(device)
    averaged = [weight.detach().clone() for weight in method.parameters()]
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-4)
    images = torch.randint(0, 256, (IMAGES, *case.shape()), dtype=torch.uint8)
    loader = DataLoader(images, batch_size=case.batch, shuffle=True, drop_last=True)
    batches = itertools.cycle(loader)
    for step in range(steps + 2):
        if step == 2:
            start = clock(device)
        x = next(batches).to(device).float() / 127.5 - 1
        plain_step(method.loss, method, optimizer, x)
        with torch.no_grad():
            for average, weight in zip(averaged, method.parameters()):
                average.mul_(0.999).add_(weight, alpha=0.001)
    return case.batch * steps / (clock(device) - start)


def plain_step(loss_of, net, optimizer, x):
    loss = loss_of(x)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    loss.item()


class Sampling:
    """The method's own sampler, and the network alone, called as the sampler calls it."""

    def __init__(self, case, device):
        method = devices.to_device(checkpoint.build(case.about()), device)
        self.method = method.eval().requires_grad_(False)
        self.D = denoiser(method)
        self.x = torch.randn(case.batch, *case.shape(), device=device)
        self.device = device
        self.autocast = devices.autocast(device, case.precision)

    @torch.no_grad()
    def network(self, steps):
        with self.autocast:
            self.D(self.x, 1.0)
            start = clock(self.device)
            for _ in range(steps):
                self.D(self.x, 1.0)
            return len(self.x) * steps / (clock(self.device) - start)

    @torch.no_grad()
    def sampler(self, steps):
        """Images and evaluations a second: EDM's sampler takes two a step, but at the last."""
        steps = max(2, steps)  # EDM's takes no fewer
        evaluations = 2 * steps - 1
        if hasattr(self.method, "kept_steps"):
            steps = 2 * steps
            evaluations = steps
        noise = seeded_noise([(0, i) for i in range(len(self.x))])
        options = dict(steps=steps, randn_like=noise)
        with self.autocast:
            next(self.method.sample(self.x, **options))
            start = clock(self.device)
            for _ in self.method.sample(self.x, **options):
                pass
            return len(self.x) * evaluations / (clock(self.device) - start)


class PeerStep:
    """Another project's network and loss in the plain step."""

    def __init__(self, name, case, device):
        config = case.config
        self.net = peer_net(name, case.size, config["width"], config["mults"]).to(device)
        self.loss = peer_loss(name, self.net, case.size).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.case = case
        self.device = device
        one = torch.zeros(1, *case.shape(), device=device)
        t = torch.zeros(1, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.net(one, t)
        self.flops = counter.get_total_flops()

    def __call__(self, steps):
        shape = (self.case.batch, *self.case.shape())
        x = torch.rand(shape, device=self.device) * 2 - 1
        for step in range(steps + 2):
            if step == 2:
                start = clock(self.device)
            plain_step(self.loss_in_precision, self.net, self.optimizer, x)
        return self.case.batch * steps / (clock(self.device) - start)

    def loss_in_precision(self, x):
        with devices.autocast(self.device, self.case.precision):
            return self.loss(x)
