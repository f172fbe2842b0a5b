"""Which U-Net learns most in equal time?

    python experiments/unet_shapes.py --peers                                              # pip install denoising-diffusion-pytorch diffusers
    python experiments/unet_shapes.py --method pdm --shapes "" even attention=1, width=80

Trains the method on each shape (what differs from its default) for the same number of seconds, in turns of a few seconds each, so that all see the same machine; writes
parameters, arithmetic, images seen and the error on held-out images by noise level. --peers gives the method those projects' networks of the same widths too.
"""
import ast
import copy
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
from benchmark import check_peers, diffusers_net, lucidrains_net, plain
from common import write
from train import METHODS, build, check_ranges, command, flags_of, held_out_error, hold_out, pick_device, script, to_device
from unet import Block, UNet


class Even(UNet):
    """One block a level, and each level keeps its width to its end on the way up, as in Improved DDPM."""

    def __init__(self, c_in, c_out, **shape):
        super().__init__(c_in, c_out, **shape)
        channels, c = [int(shape["width"] * m) for m in shape["mults"]], int(shape["width"] * shape["mults"][-1])
        for blocks, level in zip(self.up, reversed(range(len(channels)))):
            blocks[0], c = Block(c + channels[level], channels[level], 4 * shape["width"], 0.0, level in shape["attention"]), channels[level]


class Peer(nn.Module):
    """Another project's network as one of ours, in which a step t is a number."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, c_noise, y=None):
        out = self.net(x, c_noise)
        return getattr(out, "sample", out)


def unet_shapes(*,
                method: str = "ddpm",       # as in train.py
                shapes: tuple[str, ...] = ("", "even", "attention=()", "attention=2,3", "mults=1,1,2,4", "width=32 mults=1,2,4 attention=2,"),  # even: see Even
                data: str = "digits",       # or what train.py's --data takes
                size: int = 32,             # image size
                seconds: float = 240,       # of training, for each
                turn: float = 10,           # seconds at a time
                peers: bool = False,        # and two other projects' networks of the same widths
                threads: int = 1,           # CPU threads
                out: str = "runs/unet-shapes",  # folder of unet_shapes.csv
                device: str | None = None): # cuda, mps or cpu
    """Train in turns, measure, write the table."""
    if not (seconds > 0 and turn > 0 and threads > 0):
        raise ValueError("--seconds, --turn and --threads must be above 0")
    if method not in METHODS:
        raise ValueError(f"no method {method}: choose {', '.join(METHODS)}")
    if peers:
        check_peers()
    torch.set_num_threads(threads)
    device, out, runs, makers = pick_device(device), Path(out), {}, {}
    checkpoint = plain(dict(method=method, size=size, width=None, mults=None, attention=None))
    config = checkpoint["config"]
    default, own = ({name: config[name] for name in flags_of(f)} for f in (UNet, METHODS[method]))
    for words in shapes:
        try:
            shape = {name: ast.literal_eval(value) for name, value in (word.split("=") for word in words.split() if word != "even")}
            if lacking := shape.keys() - default.keys():
                raise ValueError(f"the U-Net has no {', '.join(lacking)}")
            check_ranges(shape)
            build(checkpoint | dict(config=config | shape), "meta")
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(f"shape '{words}': {str(error).splitlines()[0]}; one is like 'width=24 mults=1,2,4 attention=2,' or 'even'")
        makers[words or "the default"] = lambda i, o, shape=default | shape, cls=Even if "even" in words.split() else UNet: cls(i, o, **shape)
    if peers:
        makers |= {"denoising-diffusion-pytorch": lambda i, o: Peer(lucidrains_net(default)), "diffusers": lambda i, o: Peer(diffusers_net(default, size))}
    (images, _), (held, _) = hold_out(pixels.load(data, size, 3)[0], None, 0)
    held = pixels.to_float(held).to(device)
    for name, make in makers.items():
        torch.manual_seed(0)
        model = to_device(METHODS[method](make, 3, **own), device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.loss(held[:1])
        runs[name] = Run(model, images, config, device, dict(shape=name, parameters=sum(p.numel() for p in model.parameters()), gflop=round(counter.get_total_flops() / 1e9, 3)))
    while any(run.seconds < seconds for run in runs.values()):
        for run in runs.values():
            run.go(min(turn, seconds - run.seconds))
        print(f"{min(run.seconds for run in runs.values()):.0f} of {seconds:g} seconds each", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "unet_shapes.csv", [run.about | dict(images=run.step * 32, **held_out_error(run.averaged, held, None)) for run in runs.values()], f"{method}, {data}, {seconds:g} s each, {threads} threads, {device}")


class Run:
    """Training in turns, as train.py does it."""

    def __init__(self, method, images, config, device, about):
        self.method, self.images, self.config, self.device, self.about, self.step, self.seconds = method, images, config, device, about, 0, 0.0
        self.averaged, self.optimizer = copy.deepcopy(method).eval().requires_grad_(False), torch.optim.Adam(method.parameters(), betas=(0.9, 0.99), fused=True)
        self.generator = torch.Generator().manual_seed(0)

    def go(self, seconds):
        start, weights = time.perf_counter(), list(self.method.parameters())
        while (now := time.perf_counter()) < start + seconds:
            self.optimizer.param_groups[0]["lr"] = self.config["lr"] * min(1, (self.step + 1) / self.config["warmup"], (self.config["decay"] / (self.step + 1)) ** 0.5)
            x = pixels.to_float(self.images[torch.randint(len(self.images), (32,), generator=self.generator)].to(self.device))
            self.method.loss(x).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch._foreach_lerp_(list(self.averaged.parameters()), [w.detach() for w in weights], 1 - min(0.999, (1 + self.step) / (10 + self.step)))
            self.step += 1
        self.seconds += now - start


main = script(unet_shapes, __doc__)

if __name__ == "__main__":
    command(main)
