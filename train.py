"""Train any of the methods:  python train.py --method pdm --patch 4

    python train.py --method pdm --help                               its flags
    python train.py --method pdm --resume --steps 8000                go on with a run
    python train.py --method iddpm --schedule linear --init runs/ddpm begin with its weights
    torchrun --standalone --nproc_per_node 4 train.py --method ddpm   on four GPUs

Every keyword argument of the method, of the U-Net and of `train` below is a flag.
"""
from plumbing import flags  # before torch: Ctrl-C while that loads ends without a traceback

# isort: split
import argparse
import copy
import math
import time
from pathlib import Path
from typing import Literal

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from edm import denoiser
from plumbing import checkpoint, contract, finetune, runs
from plumbing import device as devices
from plumbing import images as pixels
from plumbing.checkpoint import METHODS, SMALL_RUN
from plumbing.checks import check_ranges, check_room, check_types
from plumbing.device import any_of_all, rank, seed_of, seeded_noise, world
from plumbing.flags import Parser, UserError, add_flags, flags_of
from unet import UNet

NOISE_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma of the error on held-out images


def train(
    config,
    saved=None,
    given=None,
    *,
    data: str = "digits",  # built-in: digits, digits64; folder, .zip, .npy, .npz, idx, CIFAR-10
    size: tuple[int, ...] = (),  # side, or height and width; default the images' own
    channels: int | None = None,  # 1 gray, 3 colour; default what the images are
    out: str | None = None,  # folder of the run; default runs/<method>
    resume: bool = False,  # go on with the run in that folder
    init: str | None = None,  # begin with the averaged weights of this run, or ckpt.pt
    steps: int = 3000,  # optimizer steps
    batch: int = 32,  # images a step, over all processes
    accumulate: int = 1,  # parts that a batch is cut into, to save memory
    lr: float = 2e-3,  # learning rate of Adam
    beta_2: float = 0.99,  # Adam's beta_2; the papers' 0.999 is for long runs
    warmup: int = 200,  # steps over which the learning rate rises from 0
    decay: int = 500,  # steps after which it falls as 1/sqrt(step); 0 for never
    cooldown: int = 0,  # last steps, at most half of all, over which it falls to 0
    ema: float = 0.999,  # decay of the averaged weights a step, lower at first
    clip_grad: float = 1.0,  # largest norm of the gradient; 0 for any
    flip: bool = False,  # mirror half of the images (never digits or text)
    conditional: bool = False,  # train with the class labels, for --class and --guidance
    drop_label: float = 0.1,  # share of labels hidden, for guidance
    overfit: int = 0,  # train on so many images only: a self-check, they must come back
    every: int = 1000,  # steps between samples, checkpoints and held-out errors
    keep: int = 0,  # older checkpoints that stay, ckpt-001000.pt named by their step
    grid: int = 64,  # images in each grid of samples
    seed: int = 0,  # seed of the weights, the data order and the noise
    precision: Literal["auto", "fp32", "bf16"] = "auto",  # auto: bf16 where hardware has it
    compile: bool | None = None,  # torch.compile; default on CUDA, from 20,000 steps on
    device: str | None = None,  # cuda, mps or cpu; default the first that is there
):
    """Train the method of `config` (every flag) and write its run's folder.

    saved: the checkpoint to go on from. given: the flags that the user chose. UserError, before
    the folder is made, for all that can be known to be wrong.
    """
    check_ranges(config)
    device = devices.pick(device)
    run = Path(out or f"runs/{config['method']}")
    runs.check_run(run, config, saved)
    about, train_set, held_out = runs.read_data(config, given or {}, saved, device)
    method, averaged, optimizer, progress = start(about, saved, init, device, beta_2, seed)
    autocast = devices.autocast(device, precision)
    with autocast:
        some_unused = contract.dry_pass(method, about)
    loss_of = devices.shared_loss(method, some_unused)
    if devices.compiles(compile, device, steps):
        method.net.compile()
    runs.begin(run, about, method, device, precision, keep)

    R, on_crops = min(about["shape"][1:]), hasattr(method, "draw_size")
    weights, averages = list(method.parameters()), list(averaged.parameters())
    recent = []  # loss and norm of the gradient of the last steps
    stopped = False
    started = time.time() - progress.seconds
    with runs.alone(run, config, saved), runs.Stop() as stop, runs.bar(progress, steps) as bar:
        while progress.step < steps and not stopped:
            step = progress.step
            rate = learning_rate(step, steps, lr, warmup, decay, cooldown)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(seed_of(seed, step, 0))  # what all parts share
            s = method.draw_size(R, step / steps) if on_crops else R
            n = batch * R // s
            n_part = n // (accumulate * world())
            loss = 0
            for part in range(accumulate):  # its random numbers are its own, whoever draws it
                torch.manual_seed(seed_of(seed, step, 1 + rank() * accumulate + part))
                x, y = draw_batch(*train_set, n_part, flip, drop_label, device)
                with devices.exchange(loss_of, part == accumulate - 1):
                    with autocast:
                        part_loss = loss_of(x, y, s) if on_crops else loss_of(x, y)
                    (part_loss / accumulate).backward()
                loss = loss + part_loss.detach() / accumulate
            norm = torch.nn.utils.clip_grad_norm_(weights, clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            update_average(averages, weights, average_decay(ema, batch, progress.images, n))
            progress.step += 1
            progress.images += n
            progress.sizes[s] = progress.sizes.get(s, 0) + 1
            recent.append(torch.stack([loss, norm]))
            bar.update()

            report = progress.step % every == 0 or progress.step == steps
            stopped = any_of_all(stop.asked)
            if report or stopped or len(recent) == 20:  # a GPU waits where its loss is read
                progress.losses += check_finite(recent, progress.step)
                progress.seconds = time.time() - started
                bar.set_postfix(progress.so_far(), refresh=False)
                copy_buffers(averaged, method)
                recent = []
            if report:
                with autocast:
                    errors = held_out_error(averaged, *held_out, batch // accumulate)
                progress.write_row(errors, rate)
            if rank() == 0 and (report or stopped):
                state = runs.state_of(method, averaged, optimizer, progress)
                checkpoint.write(run, about | state, keep)
            if rank() == 0 and report:
                with autocast:
                    drawn = preview(averaged, about, grid, batch // accumulate)
                runs.save_pictures(run, progress, drawn)
                started = time.time() - progress.seconds  # a report is no training
    runs.say_what_next(run, progress.step, steps, stop)


# Before the first step

def start(about, saved, init, device, beta_2, seed):
    """The method, its average, the optimizer and the progress: new ones, or the saved ones."""
    check_room(checkpoint.build(about, "meta"))
    torch.manual_seed(seed)
    method = checkpoint.build(about)
    if init is not None and saved is None:
        print(finetune.take_weights(method, init, about))
    method = devices.to_device(method, device)
    averaged = copy.deepcopy(method).eval().requires_grad_(False)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(method.parameters(), betas=(0.9, beta_2), fused=fused)
    progress = runs.Progress()
    if saved is not None:
        method.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["ema"])
        checkpoint.restore_optimizer(optimizer, saved["optimizer"])
        progress = runs.Progress(**{name: saved[name] for name in vars(progress)})
    return method, averaged, optimizer, progress


# A step

def draw_batch(images, labels, n, flip, drop_label, device):
    """n images in [-1, 1], half of them mirrored if asked, and labels, some hidden (-1)."""
    i = torch.randint(len(images), (n,), device=images.device)
    x = pixels.to_float(images[i].to(device))
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    if labels is None:
        return x, None
    hidden = torch.rand(n, device=device) < drop_label
    return x, labels[i].to(device).masked_fill(hidden, -1)


def learning_rate(step, steps, lr, warmup, decay, cooldown):
    """It rises over `warmup` steps, falls as 1/sqrt(step) from `decay` on, and to 0 at last."""
    cooldown = min(cooldown, steps // 2)
    rise = (step + 1) / warmup if warmup else 1
    fall = (decay / (step + 1)) ** 0.5 if decay else 1
    last = (steps - step) / cooldown if cooldown else 1
    return lr * min(1, rise, fall) * min(1, last)


def average_decay(ema, batch, seen, n):
    """The average's decay in a step of n images: it counts images, crops are many."""
    return min(ema, (batch + seen) / (10 * batch + seen)) ** (n / batch)


@torch.no_grad()
def update_average(averages, weights, decay):
    get_ema_multi_avg_fn(decay)(averages, weights, None)


def copy_buffers(averaged, method):
    """Buffers, such as a history of losses, are not averaged."""
    for average, buffer in zip(averaged.buffers(), method.buffers()):
        average.copy_(buffer)


def check_finite(recent, step):
    """The losses of the last steps, as numbers, from pairs (loss, norm of the gradient).

    UserError that names the first step of which one of both is not finite.
    """
    recent = devices.mean_of_all(torch.stack(recent))  # (steps, 2)
    finite = recent.isfinite().all(1)
    if not finite.all():
        first = step - len(recent) + 1 + finite.int().argmin().item()
        raise UserError(
            f"the loss or its gradient is not finite at step {first}; the last good checkpoint "
            "stays. Try a lower --lr, or --precision fp32"
        )
    return recent[:, 0].tolist()


# A report

@torch.no_grad()
def held_out_error(method, x, y, n):
    """{"rmse_<sigma>": error of x_0_hat} at fixed noise, up to n images at a time."""
    D = denoiser(method)
    eps = seeded_noise([(0, i) for i in range(len(x))])(x)
    errors = {}
    for level in NOISE_LEVELS:
        noisy = x + D.round_sigma(level) * eps
        parts = zip(noisy.split(n), [None] * len(x) if y is None else y.split(n))
        x_0_hat = torch.cat([D(part, level, labels) for part, labels in parts])
        errors[f"rmse_{level:g}"] = round((x_0_hat - x).square().mean().sqrt().item(), 5)
    return errors


@torch.no_grad()
def preview(method, about, count, n):
    """`count` images from the same noise every time, by the method's own sampler.

    Up to n at a time. A chain of T steps is cut to 50. Classes take turns.
    """
    shape, classes = about["shape"], about["classes"]
    device = next(method.parameters()).device
    chain = dict(steps=min(50, method.T)) if hasattr(method, "kept_steps") else {}
    drawn = []
    for i in torch.arange(count, device=device).split(n):
        randn_like = seeded_noise([(0, k) for k in i.tolist()])
        noise = randn_like(torch.empty(len(i), *shape, device=device))
        y = i % len(classes) if classes else None
        for x, _ in method.sample(noise, y, randn_like=randn_like, **chain):
            last = x
        drawn.append(last)
    return torch.cat(drawn)


# The command line

def main(argv):
    devices.join()
    first = Parser(add_help=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    if name is None and (not argv or {"-h", "--help"} & set(argv)):
        print(checkpoint.overview(__doc__))
        return
    checkpoint.check_name(name, argv)
    parser, config = parser_of(name)
    given = parser.parse(argv, checkpoint.flags_elsewhere(name))
    config = config | given
    saved = None
    if config["resume"]:
        path = Path(config["out"] or f"runs/{name}") / "ckpt.pt"
        saved = checkpoint.read(path)
        check_types(saved["config"], [train])
        saved["config"]["method"] = saved["method"]
        config = runs.resumed(path, saved["config"], config, given)
    train(config, saved, given, **{flag: config[flag] for flag in flags_of(train)})


def parser_of(name):
    """The parser of a method's flags, and {flag: default}."""
    parser = Parser(
        prog="train.py",
        usage=f"python train.py --method {name} [flags]",
        description=checkpoint.doc_of(name),
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)
    config = dict(method=name)
    groups = {f"method {name}": METHODS[name], "U-Net": UNet, "training": train}
    for title, function in groups.items():
        config |= add_flags(parser, title, function, SMALL_RUN.get(name))
    return parser, config


if __name__ == "__main__":
    flags.run(main)
