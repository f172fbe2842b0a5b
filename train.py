"""Train any of the methods:  python train.py --method pdm --patch 4

Every keyword argument of the method, of the U-Net and of `train` below is a flag: its annotation is the type, its
default the default, the comment at the end of its line the help.
"""
import argparse
import contextlib
import copy
import csv
import datetime
import difflib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import typing
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data as pixels
from ddpm import DDPM
from edm import EDM, denoiser, nearest
from iddpm import IDDPM
from patch_diffusion import PatchDiffusion, patch_sizes
from pdm import PDM
from unet import UNet

METHODS = {"ddpm": DDPM, "iddpm": IDDPM, "pdm": PDM, "edm": EDM, "patch_diffusion": PatchDiffusion}

# Where a method wants other defaults than the signatures give, at 32x32 on a CPU; measured in experiments/README.md.
FULL_GRID = dict(width=24, mults=(1, 2, 3, 4), attention=(3,), lr=1e-3, decay=1000, steps=7000)
DEFAULTS = {"ddpm": FULL_GRID, "iddpm": FULL_GRID, "pdm": {}, "edm": FULL_GRID | dict(steps=5000, P_mean=0.0),
            "patch_diffusion": FULL_GRID | dict(width=32, mults=(1, 2, 4), attention=(2,), steps=5000, P_mean=0.0)}      # 16x16 has crops of 4x4, which halve twice

VERSION = 2  # of the checkpoint's layout
FREE = {"steps", "every", "grid", "out", "resume", "device", "data", "keep", "compile", "cooldown"}  # what --resume may change; data may move, not change
RANGES = dict(steps=(1, 1e9), batch=(1, 1e6), accumulate=(1, 1e6), every=(1, 1e9), keep=(0, 1e6), grid=(1, 4096), overfit=(0, 1e9), seed=(0, 2 ** 63),
              lr=(0, 1), beta_2=(0, 1 - 1e-9), warmup=(0, 1e9), decay=(0, 1e9), cooldown=(0, 1e9), ema=(0, 1), clip_grad=(0, 1e9), drop_label=(0, 1),
              width=(2, 1e5), mults=(1 / 64, 64), blocks=(1, 100), dropout=(0, 1), patch=(1, 1024), T=(2, 1e6),
              sigma_data=(1e-6, 1e6), P_mean=(-100, 100), P_std=(0, 100), augment=(0, 1), p_full=(0, 1))
LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # noise levels sigma of the held-out error


def train(config, state=None, *,
          data: str = "digits",        # digits (built in), or a folder, .zip, .npy, .npz, idx or CIFAR-10 binary file
          size: tuple[int, ...] = (),  # image size, one number or height and width; default the images' own, digits 32
          channels: int | None = None, # 1 gray, 3 colour; default what the images are
          out: str | None = None,      # folder of the run; default runs/<method>
          resume: bool = False,        # go on with the run in that folder
          steps: int = 3000,           # optimizer steps
          batch: int = 32,             # images a step
          accumulate: int = 1,         # parts that a batch is cut into, to save memory
          lr: float = 2e-3,            # learning rate of Adam
          beta_2: float = 0.99,        # Adam's beta_2; the papers' 0.999 is for long runs
          warmup: int = 200,           # steps over which the learning rate rises from 0
          decay: int = 500,            # steps after which it falls as 1/sqrt(step); 0 for never
          cooldown: int = 0,           # last steps, over which it falls to 0 as well: for deterministic samplers
          ema: float = 0.999,          # decay of the averaged weights, lower at first: min(ema, (1 + n) / (10 + n))
          clip_grad: float = 1.0,      # largest norm of the gradient; 0 for any
          flip: bool = False,          # mirror half of the images (never digits or text)
          conditional: bool = False,   # train with the class labels, for sample.py --class and --guidance
          drop_label: float = 0.1,     # share of labels hidden, so that guidance knows the unconditional model
          overfit: int = 0,            # train on so many images only, evenly spaced: a self-check, they must come back
          every: int = 1000,           # steps between samples, checkpoints and held-out errors
          keep: int = 0,               # older checkpoints that stay; each has its step as a second name, ckpt-001000.pt
          grid: int = 64,              # images in each grid of samples
          seed: int = 0,               # seed of the weights, the data order and the noise
          precision: typing.Literal["auto", "fp32", "bf16"] = "auto",  # of the network; auto: bf16 where the hardware has it
          compile: bool | None = None, # torch.compile the network; default: on CUDA, in runs of 20,000 steps or more
          device: str | None = None):  # cuda, mps or cpu; default the first of them that is there
    """Train the method of `config` (every flag) and write the run's folder; `state` is the checkpoint to go on from.

    Everything that can be wrong is checked before the folder is made. Raises ValueError with one line that says what.
    """
    check_ranges(config)
    rank, world = ranks()
    if batch % (accumulate * world):
        raise ValueError(f"--accumulate {accumulate}" + f" times {world} processes" * (world > 1) + f" must divide --batch {batch}")
    if flip and data == "digits":
        raise ValueError("--flip would teach mirrored digits; leave it out")
    device = pick_device(device)
    precision = precision_on(device, precision)
    run = Path(out or f"runs/{config['method']}")
    if not resume and ((run / "ckpt.pt").exists() or (run / "log.csv").exists()):
        raise ValueError(f"{run} holds a run already: --resume goes on with it, --out chooses another folder")
    if resume and "optimizer" not in state:
        raise ValueError(f"{run} holds no optimizer, so it cannot go on: joined parts are for sampling")
    if resume and state["step"] >= steps:
        raise ValueError(f"{run} is at step {state['step']} already: give a larger --steps")
    if resume and config.get("sizes") == "progressive" and state["config"]["steps"] != steps:
        raise ValueError(f"progressive patch sizes follow --steps, {state['config']['steps']} in {run}; a resumed run cannot change it to {steps}")

    images, labels, names = pixels.load(data, size or None, channels)
    if conditional and labels is None:
        raise ValueError(f"--conditional needs classes: {data} has none (one sub-folder a class, or labels in an .npz)")
    shape, names = list(images.shape[1:]), names if conditional else []
    some, latents = pixels.to_float(images[:: len(images) // 1000 + 1]), images.is_floating_point()
    print(f"{data}: {len(images):,} images, {'x'.join(map(str, shape))}, {'no' if labels is None else len(labels.unique())} classes, mean {some.mean():.3f}, std {some.std():.3f} "
          + (f"from {some.min():.3g} to {some.max():.3g}: floats, so latents, used as they are and not clipped; pixels are uint8" if latents else "in [-1, 1]"))
    fingerprint = zlib.crc32(images.numpy())
    if resume and state.get("fingerprint", fingerprint) != fingerprint:
        raise ValueError(f"{data} does not hold the images that {run} was trained on")
    labels = labels if conditional else None
    if latents:
        config = config | {name: False for name in ("clip", "quarter") if name in config}
        if config.get("objective", "simple") != "simple" or config.get("learn_variance"):
            raise ValueError("the bound that a learned variance trains on is one of 8-bit pixels; latents do without: " + ("--objective simple" if "objective" in config else "--no-learn_variance"))
    total, ((images, labels), (held, held_y)) = len(images), hold_out(images, labels, overfit)
    if total < 1000 and not overfit:
        print("note: so few images are soon learned by heart" + "; none is held out, rmse_* are of images trained on" * (len(images) == total))
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    held = pixels.to_float(held).to(device)
    labels, held_y = (None, None) if labels is None else (labels.to(device), held_y.to(device))

    torch.manual_seed(seed)
    saved = dict(version=VERSION, method=config["method"], config={k: v for k, v in config.items() if k not in ("out", "resume", "device", "compile")},
                 shape=shape, classes=names, latents=latents, fingerprint=fingerprint)
    method = to_device(build(saved), device)
    averaged = copy.deepcopy(method).eval().requires_grad_(False)
    weights = list(method.parameters())
    optimizer = torch.optim.Adam(weights, lr=lr, betas=(0.9, beta_2), fused=device.type in ("cpu", "cuda"))  # a third of the plain one's time: 4% of a PDM step on a CPU
    step, seen, seconds, R = 0, 0, 0.0, min(shape[1:])
    losses, norms, levels, largest = [], [], [], []              # since the last line of the log; the others since the last look at them
    sizes = dict.fromkeys(patch_sizes(R, method.p_full, method.quarter), 0) if isinstance(method, PatchDiffusion) else {}  # {crop size: steps}
    if resume:
        method.load_state_dict(state["model"])
        averaged.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen, seconds = state["step"], state["images"], state["seconds"]
        sizes |= state.get("sizes", {})
        losses = list(torch.tensor(state.get("losses", [])).to(device))
        set_rng_state(state["rng"], device)
    method.net.register_forward_pre_hook(lambda net, x: levels.append(x[1]))
    if compiles(device, steps) if compile is None else compile:
        for net in unets(method):
            net.forward = torch.compile(net.forward)
    for module in (method, averaged):
        to_precision(module, device, precision)
    loss_of = method.loss if world == 1 else parallel(method, find_unused_parameters=bool(config.get("split_snr")))
    method.net.register_forward_hook(lambda net, x, out: largest.append(out.detach().flatten(1).abs().amax(1)))
    if rank == 0:
        make_folder(run, room=40 * sum(p.numel() for p in weights))
        log = Log(run / "log.csv", step)
    print(f"{config['method']}: {sum(p.numel() for p in weights):,} parameters, {device}, {precision}, " + f"{world} processes, " * (world > 1) + f"to {run}/")

    def write_checkpoint():
        averaged.load_state_dict(method.state_dict() | dict(averaged.named_parameters()))   # buffers are copied, not averaged
        save(run / "ckpt.pt", dict(saved, model=method.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(),
                                   step=step, images=seen, sizes=sizes, losses=[] if report else recent.tolist(), seconds=seconds + time.time() - start, rng=rng_state(device)), keep)

    start, whole = time.time(), config.get("part") is None      # samples of one part alone would be noise
    since, seen_before, part_of_batch = start, seen, min(64, max(16, batch // accumulate))
    with Stop() as stop, tqdm(total=steps, initial=step, unit=" steps", mininterval=0.5) as bar:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / max(1, warmup), (decay / (step + 1)) ** 0.5 if decay else 1) * min(1, (steps - step) / max(1, cooldown))
            loss, n, crop = 0, batch, ()
            if sizes:
                size = method.draw_size(R, step / steps)
                sizes[size] += 1
                n, crop = batch * R // size, (size,)
            for k in range(accumulate):
                i = torch.randint(len(images), (n // accumulate,), device=images.device)
                x, y = pixels.to_float(images[i].to(device)), None if labels is None else labels[i]
                if flip:
                    x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x, x.flip(3))
                if y is not None:
                    y = torch.where(torch.rand(len(y), device=device) < drop_label, -1, y)
                with contextlib.nullcontext() if world == 1 or k == accumulate - 1 else loss_of.no_sync():
                    part = loss_of(x, y, *crop) / accumulate
                    (part * world).backward()                  # DistributedDataParallel takes the mean over processes; this makes it the sum
                loss = loss + part.detach()
            norms.append(torch.nn.utils.clip_grad_norm_(weights, clip_grad or math.inf))
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(list(averaged.parameters()), [w.detach() for w in weights],      # half the time of a loop: 1% of a PDM step
                                 1 - min(ema, (batch + seen) / (10 * batch + seen)) ** (n / batch))
            step, seen = step + 1, seen + n
            losses.append(loss)
            bar.update()
            report, stopped = step % every == 0 or step == steps, stop.agreed()
            if report or stopped or len(losses) % 20 == 0:
                recent = torch.stack(losses).cpu()
                finite = (recent[-len(norms):] * torch.stack(norms).cpu()).isfinite()
                if not finite.all():
                    k = int(finite.logical_not().nonzero()[0])
                    calls = slice(k * accumulate, (k + 1) * accumulate)
                    where = noise_level(method, torch.cat(levels[calls])[torch.cat(largest[calls]).argmax()])
                    raise ValueError(f"the loss or its gradient is not finite at step {step - len(norms) + 1 + k}, near {where}; "
                                     "the last good checkpoint stays. Try a lower --lr, or --precision fp32")
                for fresh in (norms, levels, largest):
                    fresh.clear()
                rate = (seen - seen_before) / (time.time() - since)
                bar.set_postfix(loss=f"{recent.mean():.4f}", images_per_s=f"{rate:.0f}", refresh=False)
            if rank == 0 and report:                            # the log first: a line too many goes on --resume, one too few would be lost
                errors = held_out_error(averaged, held, held_y, part_of_batch)
                log.write(dict(step=step, images=seen, loss=f"{recent.mean():.5f}", **errors, lr=f"{optimizer.param_groups[0]['lr']:g}",
                               images_per_s=f"{rate:.1f}", seconds=f"{seconds + time.time() - start:.1f}",
                               **{f"share_{size}": f"{count / step:.4f}" for size, count in sizes.items()}))
            if rank == 0 and (report or stopped):
                write_checkpoint()
            if rank == 0 and report and whole:
                drawn = preview(averaged, shape, len(names), grid, part_of_batch)
                pixels.save_grid(drawn, run / "samples" / f"{step:06d}.png")
            if report:
                losses, since, seen_before = [], time.time(), seen
            if stopped:
                break
    if step < steps:
        print(f"stopped at step {step}; {run / 'ckpt.pt'} is written, --resume goes on")
        sys.exit(130)
    after = f" and {run / 'samples' / f'{step:06d}.png'}; now: python sample.py {run / 'ckpt.pt'}" if whole else "; experiments/join_parts.py joins it with the other parts"
    print(f"wrote {run / 'ckpt.pt'}, {run / 'log.csv'}{after}")


def check_ranges(config):
    for name, (low, high) in RANGES.items():
        for value in np.atleast_1d(config.get(name, low)):
            if not low <= value <= high:
                raise ValueError(f"--{name} must lie between {low:g} and {high:g}, got {value}")


class Stop:
    """While it is open, Ctrl-C and SIGTERM only ask, so that the step is finished and saved; another one, two seconds later, interrupts."""

    def __enter__(self):
        self.asked = None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and time.time() > self.asked + 2:    # torchrun passes on a Ctrl-C that its processes have had already
            raise KeyboardInterrupt
        self.asked = self.asked or time.time()

    def agreed(self):
        """Whether this process was asked, or any of those that train with it."""
        asked = torch.tensor(float(self.asked is not None))
        if ranks()[1] > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def hold_out(images, labels, overfit):
    """(images, labels) to train on and up to 128 others to measure on, evenly spaced; some of the same where --overfit."""
    if overfit or len(images) < 40:
        part = evenly(overfit or len(images), len(images))
        return [(images[k], None if labels is None else labels[k]) for k in (part, part[evenly(128, len(part))])]
    held = evenly(min(128, len(images) // 20), len(images))
    rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, held, False)
    return [(images[k], None if labels is None else labels[k]) for k in (rest, held)]


def evenly(n, total):
    """Indices of n of `total` images, evenly spaced, since a folder's come class by class; all where there are fewer."""
    return torch.linspace(0, total - 1, n).long() if n < total else torch.arange(total)


def make_folder(run, room):
    """Make the run's folder; ValueError where the disk has no room (bytes) for its checkpoint beside the old one."""
    parent = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < room:
        raise ValueError(f"{run} needs {room / 1e6:.0f} MB for its checkpoints; the disk has {free / 1e6:.0f} MB left")
    (run / "samples").mkdir(parents=True, exist_ok=True)


def compiles(device, steps):
    """Whether to compile without being asked: on CUDA with Triton, in a run that is long beside the minute or two it takes."""
    return device.type == "cuda" and steps >= 20_000 and importlib.util.find_spec("triton") is not None


def rng_state(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [torch.mps.get_rng_state()] if device.type == "mps" else [])


def set_rng_state(states, device):
    torch.set_rng_state(states[0])
    if device.type != "cpu" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device) if device.type == "cuda" else torch.mps.set_rng_state(states[1])


def noise_level(method, c_noise):
    """The step t, or the sigma, that the network knows by this c_noise, as text."""
    if hasattr(method, "T"):
        return f"t = {c_noise.item():.0f}"
    sigma = torch.logspace(-3, 3, 1000, dtype=torch.float64).view(-1, 1, 1, 1)
    return f"sigma = {sigma[(method.coefficients(sigma)[3].cpu() - c_noise.item()).abs().argmin()].item():.2g}"


# Several processes, one run (torchrun)

@contextlib.contextmanager
def together():
    """Join the processes that torchrun started, where it did; all but the first fall silent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=1))
    if ranks()[0] > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    yield
    torch.distributed.destroy_process_group()


def ranks():
    """(number of this process, how many there are); (0, 1) where torchrun started none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Loss(nn.Module):
    """method.loss as a forward pass, as DistributedDataParallel wants it."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, *arguments):
        return self.method.loss(*arguments)


def parallel(method, **options):
    """method.loss, with the network's work shared among the processes.

    Each runs the network on its rows of the batch alone and is told what it gave for the others. So all draw the same numbers and know the loss of
    the whole batch, whatever a method computes from it, and any number of processes trains the same model; only gradients differ, and are summed.
    """
    (rank, world), before = ranks(), []

    def mine(x):
        return tuple(map(mine, x)) if isinstance(x, tuple) else None if x is None else x.chunk(world)[rank]

    def own_rows(net, arguments):
        device = arguments[0].device
        before.append(rng_state(device))
        torch.manual_seed(int(torch.randint(2 ** 62, ())) + rank)             # for dropout, which must differ
        return mine(arguments)

    def all_rows(net, arguments, own):
        set_rng_state(before.pop(), own.device)
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(world)]
        torch.distributed.all_gather(parts, own.detach().contiguous())
        return torch.cat([*parts[:rank], own, *parts[rank + 1:]])
    method.net.register_forward_pre_hook(own_rows)
    method.net.register_forward_hook(all_rows)
    return nn.parallel.DistributedDataParallel(Loss(method), **options)


def unets(method):
    """The networks of a method: one, or one a part."""
    return [module for module in method.modules() if isinstance(module, UNet)]


def to_precision(method, device, precision):
    """Let the networks of a method, and nothing else of it, compute in bf16, if that is the precision; what they give is float32."""
    for net in unets(method) if precision == "bf16" else ():
        forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
        net.forward = lambda *x, forward=forward: forward(*x).float()


def build(checkpoint, device="cpu"):
    """The untrained method that a checkpoint-style dict(method, config, shape, classes) describes; its network on "meta" takes no memory."""
    cls, shape = METHODS[checkpoint["method"]], checkpoint["shape"]
    unet, arguments = ({name: checkpoint["config"].get(name, p.default) for name, (p, _) in flags_of(f).items()} for f in (UNet, cls))
    crops = (4 if arguments["quarter"] else 2) if arguments.get("p_full", 1) < 1 else 1
    check_size(shape[1:], math.lcm(*np.atleast_1d(arguments.get("patch", 1)).tolist()), unet["mults"], unet["attention"], crops)

    def make_net(in_channels, out_channels):
        with torch.device(device):
            return UNet(in_channels, out_channels, **unet, classes=len(checkpoint["classes"]))
    return cls(make_net, shape[0], **arguments)


def check_size(size, patch, mults, attention, crops=1, change="--size"):
    """ValueError where patches, crops (down to R / crops) and levels do not divide the image, with the nearest sizes that they do, and what to `change`."""
    if not all(0 <= level < len(mults) for level in attention):
        raise ValueError(f"--attention names levels of the U-Net, 0 to {len(mults) - 1} with these --mults, got {' '.join(map(str, attention))}")
    k = patch * crops * 2 ** (len(mults) - 1)
    if any(n % k for n in size):
        near = sorted({tuple(max(k, n // k * k) for n in size), tuple(-(-n // k) * k for n in size)})
        near = " or ".join(" ".join(map(str, sides if sides[0] != sides[1] else sides[:1])) for sides in near)
        why = f"crops of R/{crops} x " if crops > 1 else f"patch {patch} x " if patch > 1 else ""
        raise ValueError(f"image size {'x'.join(map(str, size))} is not divisible by {k} ({why}2^{len(mults) - 1} for {len(mults)} levels): "
                         f"choose {change} {near}" + (f", or another {'--patch or ' * (patch > 1)}--mults" if change == "--size" else ""))


def to_device(method, device):
    """Move a method; channels_last: sampling 1.2 to 1.5x, training 1.0 to 1.1x as fast on a CPU."""
    if device.type == "mps":  # it has no float64; the schedule loses digits there
        return method.float().to(device)
    return method.to(device, memory_format=torch.channels_last)


def pick_device(name=None):
    """torch.device: the one named, or the first of cuda, mps and cpu that is there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and ranks()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"no device {name} here: {str(error).splitlines()[0]}")


def precision_on(device, precision):
    """bf16 or fp32; auto is bf16 on CUDA from Ampere on, and on CPUs that multiply in it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if native else "fp32"


def save(path, checkpoint, keep=0):
    """Write a dict of plain types and tensors: all of it, or nothing. With `keep`, under its step too (ckpt-001000.pt), and so many older ones stay."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                      # torch makes a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, the one before it stays: {str(error).splitlines()[0]}")
    if keep:
        numbered = path.with_name(f"{path.stem}-{checkpoint['step']:06d}{path.suffix}")
        numbered.unlink(missing_ok=True)
        try:
            os.link(temporary, numbered)                          # a second name, at once
        except OSError:                                           # a file system without them
            shutil.copy(temporary, f"{numbered}.tmp")
            os.replace(f"{numbered}.tmp", numbered)
    os.replace(temporary, path)
    for old in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))[:-keep - 1] if keep else ():
        old.unlink()


def load(path, *, ema=True, device=None):
    """(method in eval mode, with the averaged weights or the raw ones; checkpoint dict) from a path that `save` wrote."""
    device, checkpoint = pick_device(device), read(path)
    if checkpoint["config"].get("part") is not None:
        raise ValueError(f"{path} is one part of a chain: experiments/join_parts.py joins it with the others")
    try:
        check_ranges(checkpoint["config"])
        weights = checkpoint["ema" if ema else "model"]
        if any(w.shape != weights[name].shape for name, w in build(checkpoint, "meta").state_dict().items()):    # before memory is asked for
            raise KeyError("its weights are not those of its flags")
        method = build(checkpoint)
        method.load_state_dict(weights)
    except NotImplementedError:
        raise                                                     # a blank of the course's
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this version: {str(error).splitlines()[0]}")
    return to_device(method, device).eval().requires_grad_(False), checkpoint


def read(path):
    if not Path(path).is_file():
        raise ValueError(f"no such checkpoint: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is not a checkpoint of this project: {str(error).splitlines()[0]}")
    if not isinstance(checkpoint, dict) or checkpoint.get("method") not in METHODS or len(checkpoint.get("shape", ())) != 3:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if checkpoint.get("version", VERSION) != VERSION:
        raise ValueError(f"{path} has layout {checkpoint['version']}, this version reads {VERSION}")
    return checkpoint


class Log:
    """log.csv, written whole for each new line; on resuming, the lines after `step` go."""

    def __init__(self, path, step):
        self.path, self.rows = path, []
        if path.exists():
            with open(path) as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def write(self, row):
        self.rows.append(row)
        temporary = self.path.with_name("log.csv.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)


@torch.no_grad()
def held_out_error(method, x, y, batch=64):
    """{"rmse_<sigma>": error of x_0_hat} at fixed noise levels and fixed noise, on images in [-1, 1]; of a --part, "" at the levels that others have."""
    D, errors, eps = denoiser(method), {}, seeded_noise([(0, i) for i in range(len(x))])(x)
    for level in LEVELS:
        if getattr(method, "part", None) is not None and method.net.part_of[1 + nearest(D.sigma, level)] != method.part:
            errors[f"rmse_{level:g}"] = ""
            continue
        noisy = x + D.round_sigma(level) * eps
        x_0_hat = torch.cat([D(noisy[i:i + batch], level, None if y is None else y[i:i + batch]) for i in range(0, len(x), batch)])
        errors[f"rmse_{level:g}"] = f"{(x_0_hat - x).square().mean().sqrt():.5f}"
    return errors


def preview(method, shape, classes, n, batch=64):
    """n images from the same noise every time, by the method's own sampler, in 50 steps where that is a chain of T."""
    drawn, chain = [], dict(steps=min(50, method.T)) if hasattr(method, "T") else {}
    for i in torch.arange(n, device=next(method.parameters()).device).split(batch):
        noise = seeded_noise([(0, k) for k in i.tolist()])
        for x, _ in method.sample(noise(torch.empty(len(i), *shape, device=i.device)), i % classes if classes else None, randn_like=noise, **chain):
            pass
        drawn.append(x)
    return torch.cat(drawn)


def seeded_noise(keys):
    """A randn_like in which image k of a batch depends on keys[k], (seed, i), alone: not on the batch, the device or the order."""
    generators = [torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)) for key in keys]

    def randn_like(x):
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
    return randn_like


# Signatures as command lines

@functools.cache
def flags_of(function):
    """{name: (parameter, help)} of the keyword-only arguments that have a type; the help is the comment on their line."""
    function = function.__init__ if inspect.isclass(function) else function
    source, parameters = inspect.getsource(function), inspect.signature(function).parameters
    return {name: (p, (re.findall(rf"\b{name}: .*?# *(.+)", source) or [""])[0])
            for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty}


def add_flags(parser, title, function, defaults={}):
    """Add a function's flags to a parser; returns {name: default}."""
    group, values = parser.add_argument_group(title), {}
    for name, (p, help) in flags_of(function).items():
        default = values[name] = defaults.get(name, p.default)
        kind = p.annotation
        if typing.get_origin(kind) in (types.UnionType, typing.Union):             # X | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            options = dict(choices=typing.get_args(kind))
        elif typing.get_origin(kind) is tuple:                                     # none at all only where that says something: --attention
            options = dict(nargs="*" if p.default == () != default else "+", type=typing.get_args(kind)[0], metavar="N")
        else:
            options = dict(type=kind, metavar=kind.__name__)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if default is None or default == () else f" [{shown}]"
        group.add_argument(f"--{name.rstrip('_')}", dest=name, default=argparse.SUPPRESS, help=(help + shown).replace("%", "%%"), **options)
    return values


class Parser(argparse.ArgumentParser):
    """argparse that spells flags out and raises its errors."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise ValueError(message)

    def parse(self, argv, method, needs={}):
        """{name: value} of the flags given; refuses the others, another method's by name. needs: {flag: what it goes with}."""
        given, rest = self.parse_known_args(argv)
        for word in rest:
            name = word.lstrip("-").split("=")[0].removeprefix("no-")
            owners = [m for m, cls in METHODS.items() if name in flags_of(cls) | flags_of(cls.sample)]
            if name in needs:
                raise ValueError(f"--{name} goes with {needs[name]}")
            near = difflib.get_close_matches(word, self._option_string_actions, 1)
            raise ValueError(f"--{name} belongs to {', '.join(owners)}, not to {method}" if owners and method not in owners
                             else f"no such flag: {word}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def script(function, doc):
    """The main(argv) of a script of one function: its keyword arguments are the flags, its positional ones the words before them."""
    name = function.__name__

    def main(argv):
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        parser = Parser(prog=f"{name}.py", description=doc)
        add_flags(parser, name, function)
        given = parser.parse(argv[len(words):], name)
        try:
            inspect.signature(function).bind(*words)
        except TypeError as error:
            raise ValueError(f"{name}.py: {error}; see --help")
        function(*words, **given)
    return main


def command(main):
    """Run main, with a user's mistakes as one line and exit code 2."""
    try:
        with together():
            main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except torch.cuda.OutOfMemoryError:
        sys.exit(fail("the GPU's memory is too small for this: lower --batch, or raise --accumulate"))
    except (ValueError, OSError) as error:
        sys.exit(fail(error))
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(fail(f"torch.compile does not work here, give --no-compile: {str(error).splitlines()[0]}"))
        raise


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv):
    first = Parser(add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    if name is None and (not argv or {"-h", "--help"} & set(argv)):
        print(f"{__doc__}\n    python train.py --method METHOD --help    its flags\n")
        print("\n".join(f"    {key:16} {sys.modules[cls.__module__].__doc__.splitlines()[0]}" for key, cls in METHODS.items()))
        return
    if name not in METHODS:
        raise ValueError(("choose a method: " if name is None else f"no method {name}: choose ") + ", ".join(f"--method {key}" for key in METHODS))
    cls = METHODS[name]
    parser = Parser(prog="train.py", usage=f"python train.py --method {name} [flags]", description=sys.modules[cls.__module__].__doc__.split("\n\n")[0])
    parser.add_argument("--method", help=argparse.SUPPRESS)
    config = dict(method=name)
    for title, function in ((f"method {name}", cls), ("U-Net", UNet), ("training", train)):
        config |= add_flags(parser, title, function, DEFAULTS[name])
    given = parser.parse(argv, name)
    config, state = config | given, None
    if config["resume"]:
        path = Path(config["out"] or f"runs/{name}") / "ckpt.pt"
        state = read(path)
        clash = [key for key, value in given.items() if key not in FREE and state["config"].get(key) != value]
        if clash:
            raise ValueError(f"--{clash[0]} is {state['config'].get(clash[0])} in {path}; a resumed run cannot change it to {given[clash[0]]}")
        config = config | state["config"] | {key: value for key, value in given.items() if key in FREE}
    train(config, state, **{key: config[key] for key in flags_of(train)})


if __name__ == "__main__":
    command(main)
