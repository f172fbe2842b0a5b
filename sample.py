"""Draw images from a trained model:  python sample.py runs/pdm/ckpt.pt

The checkpoint's path is all it needs. Its flags are the keyword arguments of `sample` below and of the sampler, which is the
method's own or one of EDM's:  python sample.py runs/pdm/ckpt.pt --sampler heun --help
"""
import functools
import re
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as pixels
from edm import denoiser, ode_sample
from patch_diffusion import PatchDiffusion, coordinates
from train import METHODS, Parser, add_flags, check_size, command, flags_of, load, ranks, read, seeded_noise, to_precision, unets
from unet import Guided

SAMPLERS = dict(own={}, heun={}, euler=dict(solver="euler"),
                churn=dict(steps=256, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003))  # EDM Table 5, ImageNet-64


def sample(path, options, *,
           sampler: typing.Literal["own", "heun", "euler", "churn"] = "own",  # the method's own, or EDM's: second order, first order, stochastic
           n: int | None = None,       # number of images; default 64, 8 in each of several rows, 8 for --gif, 1 for --strip
           seed: int = 0,              # image i depends on (seed, i) alone, not on --n, --batch or the device
           seeds: str | None = None,   # one seed an image, as 0-63,100: each is the first image of that --seed, and its file is named by it
           batch: int = 64,            # images at a time; halved by itself where a GPU's memory is short
           class_: tuple[str, ...] = (),  # a class, by name or number; several, or "all": a row for each; default all in turn
           guidance: tuple[float, ...] = (),  # weight of classifier-free guidance; several: a row for each; default 1, pdm 1.5, patch_diffusion 1.3
           clip: bool | None = None,   # clip x_0_hat to [-1, 1] in the method's own sampler; default as trained
           variance: typing.Literal["large", "small"] | None = None,  # its variance, where none is learned; default as trained
           precision: typing.Literal["fp32", "bf16"] = "fp32",  # of the network; the sampler's state stays as it is
           compare: tuple[str, ...] = (),  # more checkpoints, drawn from the same noise: a row for each
           gif: bool = False,          # the chain as an animation: x above, the estimate of x_0 below
           strip: bool = False,        # eight moments of the chain in a row: x above, the estimate of x_0 below
           window: tuple[int, ...] = (),  # patch_diffusion: y x h w, only this part of the image, drawn at its place
           canvas: tuple[int, ...] = (),  # patch_diffusion: height and width of a larger or smaller canvas, with --extend or --zoom
           extend: bool = False,       # the canvas goes on past the image: coordinates beyond 1
           zoom: bool = False,         # the canvas is the image at another size: coordinates within 1
           raw: bool = False,          # use the weights as trained, not their average
           out: str | None = None,     # a .png for one grid, a new folder for numbered .png files, a .npy for latents; default in the run
           device: str | None = None): # cuda, mps or cpu; default the first of them that is there
    """Write images drawn with `sampler` under its own `options`. Raises ValueError before any work."""
    loaded = {p: load(p, ema=not raw, device=device) for p in (path, *compare)}
    for method, _ in loaded.values():
        learned = getattr(method, "learned", False)
        for name, value in {name: value for name, value in dict(clip=clip, variance=variance).items() if value is not None}.items():
            if sampler != "own" or not hasattr(method, name) or name == "variance" and learned:
                raise ValueError(f"--{name} does not suit --sampler {sampler} of {type(method).__name__}" + " with a learned variance" * learned)
            setattr(method, name, value)
        to_precision(method, next(method.parameters()).device, precision)
    checkpoint, w = loaded[path][1], guidance[0] if guidance else None
    class_ = tuple(checkpoint["classes"]) if class_ == ("all",) and checkpoint["classes"] else class_
    rows_of = {"--class": len(class_) > 1, "--guidance": len(guidance) > 1, "--compare": compare, "--gif": gif, "--strip": strip}
    if sum(map(bool, rows_of.values())) > 1:
        raise ValueError(f"{' and '.join(flag for flag, given in rows_of.items() if given)} do not go together: only one of them can make the rows")
    rows = ([(f"w = {weight:g}", path, class_, weight) for weight in guidance] if len(guidance) > 1 else
            [(name, path, (name,), w) for name in class_] if len(class_) > 1 else
            [(Path(p).resolve().parent.name, p, class_, w) for p in (path, *compare)])
    if len({row[0] for row in rows}) < len(rows):
        rows = [(f"{k} {row[0]}", *row[1:]) for k, row in enumerate(rows, 1)]
    keys = parse_seeds(seeds, n) if seeds else [(seed, i) for i in range(n if n is not None else 1 if strip else 8 if gif or len(rows) > 1 else 64)]
    if not keys or batch < 1:
        raise ValueError(f"--n and --batch must be 1 or more, got {n} and {batch}")
    suffix = "-strip.png" if strip else ".gif" if gif else ".npy" if checkpoint.get("latents") else ".png"
    out = Path(out or Path(path).parent / "samples" / f"seed{seeds or seed}{suffix}")
    is_folder = suffix == ".png" and out.suffix.lower() not in (".png", ".npy", ".gif")
    if not out.name.lower().endswith(suffix[-4:]) and not (is_folder and (not out.exists() or out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"--out {out} must end in {suffix[-4:]}" + (", or be a new or empty folder" if suffix == ".png" else ""))

    def ready(row):
        _, p, classes, weight = row
        method, other = loaded[p]
        if other["shape"] != checkpoint["shape"]:
            raise ValueError(f"{p} draws {'x'.join(map(str, other['shape']))}, {path} {'x'.join(map(str, checkpoint['shape']))}: they cannot share their noise")
        labels = choose_labels(len(keys), classes, other["classes"])
        unguided(method)
        shape = place(method, other, window, canvas, extend, zoom)
        guide(method, weight, labels)
        return method, labels, shape, chain(method, sampler, options, shape)
    for row in rows:
        ready(row)
    (out if is_folder else out.parent).mkdir(parents=True, exist_ok=True)
    drawn, first = [], ranks()[0] == 0
    for row in rows:
        method, labels, shape, run = ready(row)
        with Cost(method, len(keys)) as cost:
            if gif or strip:
                frames = record(run, shape, keys, labels, next(method.parameters()).device)
                if first:
                    write_chain(frames, out, gif)
                continue
            drawn.append(draw(run, shape, keys, batch, labels, next(method.parameters()).device))
        cost.says(f"images {row[0]}" if len(rows) > 1 else "images", drawn[-1])
    if gif or strip:
        cost.says("images")
    elif not first:
        return
    elif is_folder:
        for (label, *_), images in zip(rows, drawn):
            inside = out / re.sub(r"[^\w.-]+", "_", label) if len(rows) > 1 else out
            inside.mkdir(exist_ok=True)
            for (s, i), image in zip(keys, images):
                pixels.to_image(image).save(inside / f"{s if seeds else i:06d}.png")
    elif suffix == ".npy":
        np.save(out, torch.cat(drawn).numpy())
    else:
        labels = [label for label, *_ in rows] if len(rows) > 1 else ()
        pixels.save_grid(torch.cat(drawn), out, len(keys) if labels else None, labels)
    print(f"wrote {out}")


def parse_seeds(text, n):
    """[(seed, 0), ...] of a text like 0-63,100."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) or n is not None:
        raise ValueError(f"--seeds reads like 0-63,100 and says by itself how many images; got {text}" + (f" and --n {n}" if n is not None else ""))
    ranges = [[int(k) for k in part.split("-")] for part in text.split(",")]
    count = sum(max(0, part[-1] - part[0] + 1) for part in ranges)
    if not 0 < count <= 10 ** 6:
        raise ValueError(f"--seeds {text} are {count:,} seeds; give 1 to 1,000,000")
    return [(s, 0) for part in ranges for s in range(part[0], part[-1] + 1)]


class Cost:
    """Network evaluations and seconds that are spent inside it, for each of n images."""

    def __init__(self, method, n):
        self.nets, self.n, self.seen = unets(method), n, 0

    def __enter__(self):
        self.hooks, self.start = [net.register_forward_hook(self.count) for net in self.nets], time.time()
        return self

    def count(self, net, inputs, output):
        self.seen += len(inputs[0])

    def __exit__(self, *_):
        self.seconds = time.time() - self.start
        if ranks()[1] > 1:
            seen = torch.tensor(self.seen)
            torch.distributed.all_reduce(seen)
            self.seen = seen.item()
        for hook in self.hooks:
            hook.remove()

    def says(self, what, images=None):
        """Print it, with the images' mean and spread, and return it."""
        print(f"{self.n} {what}: {self.seen / self.n:.0f} network evaluations and {self.seconds / self.n:.3f} s each"
              + (f"; mean {images.mean():.3f}, std {images.std():.3f} in [-1, 1]" if images is not None else ""))
        return dict(n=self.n, nfe=self.seen / self.n, seconds_per_image=self.seconds / self.n)


def unguided(method):
    method.net = method.net.net if isinstance(method.net, Guided) else method.net


def guide(method, w, labels):
    """Put classifier-free guidance of weight w, by default the method's own, round its network; the weight, None without classes."""
    if labels is None:
        if w is not None:
            raise ValueError("--guidance needs a model trained with --conditional")
        return
    w = getattr(method, "guidance", 1.0) if w is None else w
    if w != 1.0:
        method.net = Guided(method.net, w)
    return w


def chain(method, sampler, options, shape):
    """The sampler as a function of (noise, y, randn_like=...); ValueError for options that it cannot take, before any work."""
    run = method.sample if sampler == "own" else functools.partial(ode_sample, denoiser(method))
    known = flags_of(type(method).sample if sampler == "own" else ode_sample)
    options = {key: int(value) if isinstance(value, str) and value.isdigit() else value for key, value in options.items()}
    for key, value in options.items():
        if key not in known or isinstance(value, str) and str(known[key][0].annotation).find("str") < 0:
            raise ValueError(f"--{key} {value} does not suit the sampler of {type(method).__name__}")
    run = functools.partial(run, **SAMPLERS[sampler] | options)
    next(run(torch.zeros(1, *shape, device=next(method.parameters()).device)))
    return run


def place(method, checkpoint, window, canvas, extend, zoom):
    """(C, h, w) of the images to draw, a PatchDiffusion told where they lie; ValueError for a place that cannot be."""
    (C, H, W), config = checkpoint["shape"], checkpoint["config"]
    if not window and not canvas:
        if extend or zoom:
            raise ValueError("--extend and --zoom go with --canvas")
        return C, H, W
    if not isinstance(method, PatchDiffusion):
        raise ValueError(f"--{'window' if window else 'canvas'} belongs to patch_diffusion: {checkpoint['method']} knows no coordinates")
    if window:
        y, x, h, w = window if len(window) == 4 else (0, 0, 0, 0)
        if canvas or extend or zoom or min(y, x) < 0 or min(h, w) < 1 or y + h > H or x + w > W:
            raise ValueError(f"--window takes y x h w within the image of {H}x{W}, without --canvas, --extend and --zoom; got {' '.join(map(str, window))}")
        coords = coordinates(H, W)[:, y:y + h, x:x + w]
    else:
        h, w = canvas if len(canvas) == 2 else canvas * 2 if len(canvas) == 1 else (0, 0)
        if min(h, w) < 1 or extend == zoom:
            raise ValueError("--canvas takes height and width, and either --extend or --zoom")
        coords = coordinates(h, w, (H, W)) if extend else coordinates(h, w)
        print(f"note: the model was trained on {H}x{W}; how good a canvas of {h}x{w} looks is not promised")
    check_size((h, w), 1, config["mults"], config["attention"], change="a --window of" if window else "--canvas")
    method.net.coords = coords.to(next(method.parameters()).device)
    return C, h, w


def draw(run, shape, keys, batch, labels, device):
    """Images (n, C, H, W) in [-1, 1], on the CPU, drawn by the sampler `run`; image k is that of keys[k], (seed, i)."""
    def some(which):
        noise = seeded_noise([keys[k] for k in which])
        x, y = noise(torch.empty(len(which), *shape, device=device)), None if labels is None else labels[which].to(device)
        for x, _ in run(x, y, randn_like=noise):
            bar.update()
        return x.float().cpu()

    with tqdm(unit=" steps") as bar:
        return in_batches(some, len(keys), batch, bar)


def record(run, shape, keys, labels, device, most=60):
    """[(x, x_0_hat), ...] on the CPU along the chain, at most so many, evenly spaced, the last one always among them."""
    noise = seeded_noise(keys)
    x, y = noise(torch.empty(len(keys), *shape, device=device)), None if labels is None else labels.to(device)
    frames, stride, step = [], 1, 0
    for x, x_0_hat in tqdm(run(x, y, randn_like=noise), unit=" steps"):
        if step % stride == 0:
            frames.append((x.float().cpu(), x_0_hat.float().cpu()))
        if len(frames) >= most:
            frames, stride = frames[::2], 2 * stride
        step += 1
    return frames + [(x.float().cpu(), x_0_hat.float().cpu())]


def write_chain(frames, out, gif):
    """A .gif of all frames, or a strip of eight of them; x above, x_0_hat below, x scaled to be seen while it is mostly noise."""
    frames = [(x / (2 * x.std(dim=(1, 2, 3), keepdim=True)).clamp(min=1), x_0_hat) for x, x_0_hat in frames]
    if gif:
        pictures = [pixels.grid(torch.cat(pair), len(pair[0]), width=256) for pair in frames]
        pictures[0].save(out, save_all=True, append_images=pictures[1:] + [pictures[-1]] * 20, duration=50, loop=0)
        return
    eight = [frames[round(k * (len(frames) - 1) / 7)] for k in range(8)]
    rows = [torch.stack([pair[part][i] for pair in eight]) for i in range(len(frames[0][0])) for part in (0, 1)]
    pixels.save_grid(torch.cat(rows), out, 8, ["x", "x_0"] * (len(rows) // 2))


def in_batches(function, n, batch, bar):
    """(n, ...) on the CPU, of function(indices) over 0..n-1, `batch` at a time, or fewer where the GPU's memory is short.

    Where torchrun started several processes, each does its share, and all get the whole.
    """
    rank, world = ranks()
    share, parts, start = -(-n // world), [], 0
    mine = [min(k, n - 1) for k in range(rank * share, (rank + 1) * share)]
    while start < share:
        try:
            parts.append(function(mine[start:start + batch]))
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise ValueError("not even one image fits in the GPU's memory: try --device cpu")
            batch //= 2
            continue
        start = min(share, start + batch)
        bar.set_postfix_str(f"{start} of {share} images")
    own = torch.cat(parts).cpu()
    if world == 1:
        return own
    everyone = [torch.empty_like(own) for _ in range(world)]
    torch.distributed.all_gather(everyone, own)
    return torch.cat(everyone)[:n]


def choose_labels(n, class_, names):
    """Class indices (n,): the one given, or all in turn; None for an unconditional model; ValueError for a class that is not there."""
    if not class_:
        return torch.arange(n) % len(names) if names else None
    if not names:
        raise ValueError("--class needs a model trained with --conditional")
    name, = class_
    if name not in names and not (name.isdigit() and int(name) < len(names)):
        raise ValueError(f"no class {name}: choose one of {', '.join(names[:20])}, or a number below {len(names)}, or all")
    return torch.full((n,), names.index(name) if name in names else int(name))


def parse(argv, function, doc, example):
    """(checkpoint's path, the sampler's options, the keyword arguments of `function`) that a command line gives."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"the checkpoint's path comes first: python {example} runs/pdm/ckpt.pt [flags]")
        print(doc)
        sys.exit()
    path, name = argv[0], read(argv[0])["method"]
    first = Parser(add_help=False)
    first.add_argument("--sampler", choices=SAMPLERS, default="own")
    sampler = first.parse_known_args(argv)[0].sampler
    own, other = (METHODS[name].sample, ode_sample) if sampler == "own" else (ode_sample, METHODS[name].sample)
    parser = Parser(prog=example, usage=f"python {example} {path} [flags]", description=doc)
    defaults = add_flags(parser, example.removesuffix(".py"), function)
    add_flags(parser, f"the sampler of {name}" if sampler == "own" else f"EDM's sampler {sampler}", own, SAMPLERS[sampler])
    given = parser.parse(argv[1:], name, dict.fromkeys(flags_of(other), f"--sampler {'heun, euler or churn' if sampler == 'own' else 'own'}"))
    return path, {key: value for key, value in given.items() if key not in defaults}, {key: given[key] for key in given if key in defaults}


def main(argv):
    path, options, given = parse(argv, sample, __doc__, "sample.py")
    sample(path, options, **given)


if __name__ == "__main__":
    command(main)
