"""Draw images from a trained model:  python sample.py runs/pdm/ckpt.pt

The checkpoint's path is all it needs. Its flags are the keyword arguments of `sample` below and of the sampler, which is the
method's own or one of EDM's:  python sample.py runs/pdm/ckpt.pt --sampler heun --help
"""
import functools
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
from train import METHODS, Parser, add_flags, check_size, command, flags_of, load, read, seeded_noise
from unet import Guided

SAMPLERS = dict(own={}, heun={}, euler=dict(solver="euler"),
                churn=dict(S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003))  # EDM Table 5, ImageNet-64


def sample(path, options, *,
           sampler: typing.Literal["own", "heun", "euler", "churn"] = "own",  # the method's own, or EDM's: second order, first order, stochastic
           n: int = 64,                # number of images
           seed: int = 0,              # image i depends on (seed, i) alone, not on --n, --batch or the device
           batch: int = 64,            # images at a time; halved by itself where a GPU's memory is short
           class_: str | None = None,  # one class, by name or number; default all of them in turn
           guidance: float | None = None,  # weight of classifier-free guidance; default 1, the plain conditional model; patch_diffusion 1.3
           window: tuple[int, ...] = (),  # patch_diffusion: y x h w, only this part of the image, drawn at its place
           canvas: tuple[int, ...] = (),  # patch_diffusion: height and width of a larger or smaller canvas, with --extend or --zoom
           extend: bool = False,       # the canvas goes on past the image: coordinates beyond 1
           zoom: bool = False,         # the canvas is the image at another size: coordinates within 1
           raw: bool = False,          # use the weights as trained, not their average
           out: str | None = None,     # a .png for one grid, a new folder for numbered .png files, a .npy for latents; default in the run
           device: str | None = None): # cuda, mps or cpu; default the first of them that is there
    """Write n images drawn with `sampler` under its own `options`. Raises ValueError before any work."""
    if n < 1 or batch < 1:
        raise ValueError(f"--n and --batch must be 1 or more, got {n} and {batch}")
    method, checkpoint = load(path, ema=not raw, device=device)
    suffix = ".npy" if checkpoint.get("latents") else ".png"
    out = Path(out or Path(path).parent / "samples" / f"seed{seed}{suffix}")
    if out.suffix.lower() != suffix and (suffix == ".npy" or out.suffix.lower() == ".npy" or out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"--out {out} must end in {suffix}" + (", or be a new or empty folder" if suffix == ".png" else ": this model draws latents"))
    labels = choose_labels(n, class_, checkpoint["classes"])
    shape = place(method, checkpoint, window, canvas, extend, zoom)
    guide(method, guidance, labels)
    run = chain(method, sampler, options, shape)
    (out.parent if out.suffix.lower() == suffix else out).mkdir(parents=True, exist_ok=True)
    start = time.time()
    images = draw(run, shape, n, seed, batch, labels, next(method.parameters()).device)
    print(f"wrote {write(images, out)}; {n} images in {time.time() - start:.1f} s, mean {images.mean():.3f}, std {images.std():.3f} in [-1, 1]")


def guide(method, w, labels):
    """Put classifier-free guidance of weight w, by default the method's own, round its network."""
    if labels is None:
        if w is not None:
            raise ValueError("--guidance needs a model trained with --conditional")
        return
    w = getattr(method, "guidance", 1.0) if w is None else w
    if w != 1.0:
        method.net = Guided(method.net, w)


def chain(method, sampler, options, shape):
    """The sampler as a function of (noise, y, randn_like=...); ValueError for options that it cannot take, before any work."""
    run = method.sample if sampler == "own" else functools.partial(ode_sample, denoiser(method))
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
    check_size((h, w), 1, config["mults"], config["attention"])
    method.net.coords = coords.to(next(method.parameters()).device)
    return C, h, w


def draw(run, shape, n, seed, batch, labels, device):
    """n images (n, C, H, W) in [-1, 1], on the CPU, drawn by the sampler `run`."""
    def some(which):
        noise = seeded_noise(seed, which)
        x, y = noise(torch.empty(len(which), *shape, device=device)), None if labels is None else labels[which].to(device)
        for x, _ in run(x, y, randn_like=noise):
            bar.update()
        return x.float().cpu()

    with tqdm(unit=" steps") as bar:
        return torch.cat(in_batches(some, n, batch, bar))


def in_batches(function, n, batch, bar):
    """[function(indices), ...] over 0..n-1, `batch` at a time, or fewer where the GPU's memory is short."""
    parts, start = [], 0
    while start < n:
        try:
            parts.append(function(list(range(start, min(n, start + batch)))))
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise ValueError("not even one image fits in the GPU's memory: try --device cpu")
            batch //= 2
            continue
        start = min(n, start + batch)
        bar.set_postfix_str(f"{start} of {n} images")
    return parts


def choose_labels(n, class_, names):
    """Class indices (n,), or None for an unconditional model; ValueError for a class that is not there."""
    if class_ is None:
        return torch.arange(n) % len(names) if names else None
    if not names:
        raise ValueError("--class needs a model trained with --conditional")
    if class_ not in names and not (class_.isdigit() and int(class_) < len(names)):
        raise ValueError(f"no class {class_}: choose one of {', '.join(names[:20])}, or a number below {len(names)}")
    return torch.full((n,), names.index(class_) if class_ in names else int(class_))


def write(images, out):
    """One grid if out ends in .png, numbers as they are if in .npy, else numbered .png files. Returns the path written."""
    if out.suffix.lower() == ".png":
        pixels.save_grid(images, out)
    elif out.suffix.lower() == ".npy":
        np.save(out, images.numpy())
    else:
        for i, image in enumerate(images):
            pixels.to_image(image).save(out / f"{i:06d}.png")
    return out


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
