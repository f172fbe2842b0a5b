"""Which U-Net learns most in equal time?

    python experiments/tools/unet_shapes.py --method pdm --shapes "" even attention=1, width=80
    python experiments/tools/unet_shapes.py --peers

Trains the method on each shape (what differs from its default) for the same number of seconds,
in turns of a few seconds each, so that all see the same machine; writes parameters, arithmetic,
images seen and the error on held-out images by noise level. --peers gives the method other
projects' networks of the same widths too; it needs
pip install denoising-diffusion-pytorch diffusers.
"""
import ast
import copy
import functools
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.common import check_counts
from experiments.report import write
from experiments.tools.benchmark import config_of
from experiments.tools.peers import PEERS, Peer, check_peers, peer_net
from plumbing import checkpoint, datasets, images
from plumbing import device as devices
from plumbing.checkpoint import METHODS
from plumbing.checks import check_types
from plumbing.drawing import check_range, make_folder
from plumbing.flags import UserError, flags_of, run, script
from train import average_decay, held_out_error, learning_rate, update_average
from unet import Block, UNet

BATCH = 32
SHAPES = (
    "",
    "even",
    "attention=()",
    "attention=2,3",
    "mults=1,1,2,4",
    "width=32 mults=1,2,4 attention=2,",
)


class Even(UNet):
    """One block a level, and each level keeps its width to its end, as in Improved DDPM."""

    def __init__(self, in_channels, out_channels, **shape):
        super().__init__(in_channels, out_channels, **shape)
        width = shape["width"]
        channels = [int(width * m) for m in shape["mults"]]
        c = channels[-1]
        for stage, level in zip(self.up, reversed(range(len(channels)))):
            c_in = c + channels[level]
            c = channels[level]
            stage[0] = Block(c_in, c, 4 * width, 0.0, level in shape["attention"])


def unet_shapes(
    *,
    method: str = "ddpm",  # as in train.py
    shapes: tuple[str, ...] = SHAPES,  # "" the default; even: see Even
    data: str = "digits",  # or what train.py's --data takes
    size: int = 32,  # image size
    seconds: float = 240,  # of training, for each
    turn: float = 10,  # seconds at a time
    peers: bool = False,  # and two other projects' networks of the same widths
    threads: int = 1,  # CPU threads
    out: str = "runs/unet-shapes",  # folder of unet_shapes.csv
    device: str | None = None,  # cuda, mps or cpu
):
    """Train in turns, measure, write the table."""
    check_range("seconds", seconds, 1e-3, 1e6)
    check_range("turn", turn, 1e-3, 1e6)
    check_counts(1, threads=threads, size=size)
    if method not in METHODS:
        raise UserError(f"no method {method}: choose {', '.join(METHODS)}")
    if peers:
        check_peers()
    device = devices.pick(device)
    config = config_of(method)
    makers = {words or "the default": maker(method, size, config, words) for words in shapes}
    if peers:
        makers |= {name: peer_maker(name, size, config) for name in PEERS}
    x, _, _ = datasets.load(data, size, 3)
    (x, _), (held_out, _) = datasets.hold_out(x, None, 0)
    held_out = images.to_float(held_out).to(device)
    make_folder(Path(out))
    torch.set_num_threads(threads)

    runs = []
    for name, make_net in makers.items():
        torch.manual_seed(0)
        arguments = checkpoint.arguments_of(METHODS[method], config)
        built = devices.to_device(METHODS[method](make_net, 3, **arguments), device)
        runs.append(Run(name, built, x, config, held_out[:1]))
    while any(one.seconds < seconds for one in runs):
        for one in runs:
            one.train(min(turn, seconds - one.seconds))
        done = min(one.seconds for one in runs)
        print(f"{done:.0f} of {seconds:g} seconds each", flush=True)
    rows = [one.row() | held_out_error(one.averaged, held_out, None, 64) for one in runs]
    note = f"{method}, {data}, {seconds:g} s each, {threads} threads, {device}"
    write(Path(out) / "unet_shapes.csv", rows, note)


# Shapes


def maker(method, size, config, words):
    """The make_net of a shape in words; UserError that names the words, if it cannot be."""
    kind = Even if "even" in words.split() else UNet
    assignments = [word for word in words.split() if word != "even"]
    try:
        shape = dict(assignment(word) for word in assignments)
        check_types(shape, [UNet])
        about = dict(method=method, config=config | shape, shape=[3, size, size], classes=[])
        checkpoint.build(about, "meta")
    except (ValueError, SyntaxError, TypeError) as error:
        reason = str(error).splitlines()[0]
        hint = "one is like 'width=24 mults=1,2,4 attention=2,' or 'even'"
        raise UserError(f"shape '{words}': {reason}; {hint}") from error
    return functools.partial(kind, **checkpoint.arguments_of(UNet, config | shape))


def assignment(word):
    """("width", 24) of width=24; UserError for what is no argument of the U-Net."""
    name, is_assignment, value = word.partition("=")
    if not is_assignment or name not in flags_of(UNet):
        raise UserError(f"the U-Net has no {name}, or it has no value")
    return name, ast.literal_eval(value)


def peer_maker(name, size, config):
    def make_net(in_channels, out_channels):
        return Peer(peer_net(name, size, config["width"], config["mults"]))

    return make_net


# Training


class Run:
    """Training in turns, as train.py does it."""

    def __init__(self, name, method, images, config, one):
        self.name = name
        self.method = method
        self.images = images
        self.config = config
        self.averaged = copy.deepcopy(method).eval().requires_grad_(False)
        betas = (0.9, config["beta_2"])
        self.optimizer = torch.optim.Adam(method.parameters(), betas=betas, fused=True)
        self.generator = torch.Generator().manual_seed(0)
        self.step = 0
        self.seconds = 0.0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            method.loss(one)
        self.flops = counter.get_total_flops()

    def train(self, seconds):
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            self.train_step()
        self.seconds += time.perf_counter() - start

    def train_step(self):
        names = ("lr", "warmup", "decay", "cooldown")
        lr, *falls = (self.config[name] for name in names)
        rate = learning_rate(self.step, 10**9, lr, *falls)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        i = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        device = next(self.method.parameters()).device
        self.method.loss(images.to_float(self.images[i].to(device))).backward()
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = average_decay(self.config["ema"], BATCH, BATCH * self.step, BATCH)
        averages = list(self.averaged.parameters())
        update_average(averages, list(self.method.parameters()), decay)
        self.step += 1

    def row(self):
        parameters = sum(weight.numel() for weight in self.method.parameters())
        gflop = round(self.flops / 1e9, 3)
        seen = BATCH * self.step
        return dict(shape=self.name, parameters=parameters, gflop=gflop, images=seen)


main = script(unet_shapes, __doc__)

if __name__ == "__main__":
    run(main)
