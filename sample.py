"""Draw images from a trained model:  python sample.py runs/pdm

The run's folder, or one checkpoint in it, is all it needs. Its flags are the keyword arguments
of `sample` below and of the sampler, which is the method's own or one of EDM's:

    python sample.py runs/pdm --help                    with the flags of PDM's own sampler
    python sample.py runs/pdm --sampler heun --help     with those of EDM's: heun, euler, churn
"""
import functools
import math
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from plumbing import flags  # before torch: Ctrl-C while that loads ends without a traceback

# isort: split
import numpy as np
import torch
from torch import nn

from edm import denoiser, ode_sample
from plumbing import checkpoint, drawing, images, page
from plumbing.checks import check_size
from plumbing.datasets import height_and_width
from plumbing.device import autocast, join, rank
from plumbing.drawing import check_range, draw, guided
from plumbing.flags import Parser, UserError, add_flags, flags_of

SAMPLERS = {
    "own": {},
    "heun": {},
    "euler": dict(solver="euler"),
    # EDM Table 5, ImageNet-64
    "churn": dict(steps=256, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003),
}
# Images in a picture, by the flag that makes its rows
DEFAULT_N = {None: 64, "class": 8, "guidance": 8, "compare": 8, "gif": 8, "strip": 1, "html": 6}
SUFFIXES = {"gif": ".gif", "strip": "-strip.png", "html": ".html"}
REPLACED = {
    "window": "--window is now --size h w --corner y x --image H W",
    "canvas": "--canvas is now --size",
    "extend": "--extend is now --image H W beside --size, with the training images' H and W",
    "zoom": "--zoom is now --size alone",
}


def sample(
    path,
    options,
    saved=None,
    *,
    sampler: Literal["own", "heun", "euler", "churn"] = "own",  # the method's, or one of EDM's
    n: int | None = None,  # images; default 64, 8 in several rows and in a GIF, 1 in a strip
    seed: int = 0,  # image i depends on (seed, i) alone, not on --n, --batch or the device
    seeds: str | None = None,  # one seed an image, as 0-63,100: each the first of that --seed
    batch: int = 64,  # images at a time; halved by itself where a GPU's memory is short
    class_: tuple[str, ...] = (),  # a class; several, or all: a row for each; default in turn
    guidance: tuple[float, ...] = (),  # weight; several: a row for each; default the method's
    size: tuple[int, ...] = (),  # height and width of another canvas than the training images'
    clip: bool | None = None,  # clip x_0_hat to [-1, 1] in its own sampler; default as trained
    dynamic_clip: bool | None = None,  # or at each image's quantile (for guidance); as trained
    variance: Literal["large", "small"] | None = None,  # where none is learned; as trained
    precision: Literal["fp32", "bf16"] = "fp32",  # of the network; the state stays as it is
    compare: tuple[str, ...] = (),  # more runs, drawn from the same noise: a row for each
    gif: bool = False,  # the chain as an animation: x above, the estimate of x_0 below
    strip: bool = False,  # eight moments of the chain: x above, the estimate of x_0 below
    html: str | None = None,  # a page: a slider over the chain, at most 60 frames, under 3 MB
    raw: bool = False,  # use the weights as trained, not their average
    out: str | None = None,  # .png, new folder for numbered .png, .npy; default in the run
    device: str | None = None,  # cuda, mps or cpu; default the first that is there
):
    """Write what `sampler` draws under its `options` (a dict); the path that was written.

    saved: the checkpoint, where it has been read. Raises UserError for what cannot be, before
    any work.
    """
    kind = kind_of_rows(class_, guidance, compare, gif, strip)
    if html is not None:
        kind, out = as_page(kind, html, out)
    keys = drawing.keys_of(seed, seeds, n, DEFAULT_N[kind])
    check_range("batch", batch, 1, 10**6)
    loaded = [(path, *checkpoint.load(path, ema=not raw, device=device, saved=saved))]
    loaded += [(p, *checkpoint.load(p, ema=not raw, device=device)) for p in compare]
    rows = rows_of(loaded, class_, guidance, len(keys))
    shape = canvas(loaded, size, len(keys) * len(rows))
    most = page.most_frames(shape, len(keys) * len(rows)) if html else drawing.MOST_FRAMES
    overrides = check_overrides(
        rows, sampler, clip=clip, dynamic_clip=dynamic_clip, variance=variance
    )
    chains = [chain(row.method, sampler, options, shape) for row in rows]
    made_by = dict(seeds=seeds, n=n, sampler=sampler, class_=class_, guidance=guidance)
    made_by |= dict(size=size, compare=compare, precision=precision, raw=raw)
    made_by |= overrides | options
    words = [] if seeds else [f"seed{seed}"]
    name = drawing.picture_name(loaded[0][2], words, made_by, flags_of(sample))
    suffix = SUFFIXES.get(kind, ".npy" if loaded[0][2]["latents"] else ".png")
    out = prepare(out, path, name, suffix)

    drawn = []
    for row, run in zip(rows, chains):
        where = next(row.method.parameters()).device
        with (
            drawing.changed(row.method, **overrides),
            drawing.counted(row.method, len(keys)) as cost,
            guided(row.method, row.guidance),
            autocast(where, precision),
        ):
            if kind in ("gif", "strip", "html"):
                states = drawing.from_noise(run) if html else run
                drawn.append(drawing.record(states, shape, keys, row.labels, where, most))
            else:
                drawn.append(draw(run, shape, keys, batch, row.labels, where))
        print(f"{row.name}: {cost}{drawing.guidance_note(row.labels, row.guidance)}")
    if rank() == 0:
        if html:
            page.save(rows, chains, drawn, keys, out)
        else:
            write(drawn, rows, [s if seeds else i for s, i in keys], out)
        print(f"wrote {out}")
    return out


# What is drawn

class Row(NamedTuple):
    """A row of the picture; all rows start from the same noise."""

    name: str
    method: nn.Module
    labels: torch.Tensor | None  # (n,), None for an unconditional model
    guidance: float


def kind_of_rows(class_, guidance, compare, gif, strip):
    """The flag that makes the rows of the picture, or None; UserError where two do."""
    asked = {
        "class": len(class_) > 1 or class_ == ("all",),
        "guidance": len(guidance) > 1,
        "compare": len(compare) > 0,
        "gif": gif,
        "strip": strip,
    }
    kinds = [flag for flag, value in asked.items() if value]
    if len(kinds) > 1:
        text = " and ".join(f"--{flag}" for flag in kinds)
        raise UserError(f"{text} do not go together: only one of them can make the rows")
    return kinds[0] if kinds else None


def as_page(kind, html, out):
    """("html", its path): a page has rows of any kind; UserError beside another output."""
    if kind in ("gif", "strip"):
        raise UserError(f"--html and --{kind} do not go together: the page shows the chain")
    if out is not None:
        raise UserError("--html names the file itself: leave out --out")
    return "html", html


def rows_of(loaded, class_, guidance, n):
    """A Row a class, or a weight, or a run; loaded: (path, method, checkpoint) of each run.

    Where runs are compared the weight is 1 by default, elsewhere that of the method's paper.
    """
    default = 1.0 if len(loaded) > 1 else None
    w = guidance[0] if guidance else default
    _, method, saved = loaded[0]
    if class_ == ("all",) and saved["classes"]:
        class_ = tuple(saved["classes"])
    if len(class_) > 1:
        rows = [make_row(name, method, saved, (name,), w, n) for name in class_]
    elif len(guidance) > 1:
        rows = [make_row(f"w = {w:g}", method, saved, class_, w, n) for w in guidance]
    else:
        rows = [make_row(drawing.run_name(p), m, other, class_, w, n) for p, m, other in loaded]
    if len({drawing.as_file_name(row.name) for row in rows}) < len(rows):
        return [row._replace(name=f"{k} {row.name}") for k, row in enumerate(rows, 1)]
    return rows


def make_row(name, method, saved, class_, w, n):
    labels = drawing.choose_labels(n, class_, saved["classes"])
    return Row(name, method, labels, drawing.choose_guidance(method, w, labels))


def canvas(loaded, size, n):
    """(C, h, w) of n images to draw: the training images', or of another --size.

    UserError where runs differ in shape, a network cannot take the size, memory is too small.
    """
    path, _, saved = loaded[0]
    channels, *trained = saved["shape"]
    sides = list(height_and_width(size or None) or trained)
    for other_path, method, other in loaded:
        if other["shape"] != saved["shape"]:
            raise UserError(f"{other_path} and {path} draw other shapes: they share no noise")
        # That of a method which trains on crops speaks of those
        multiple = 1 if hasattr(method, "draw_size") else getattr(method, "size_multiple", 1)
        check_size(sides, multiple, checkpoint.levels_of(other))
    if 4 * n * channels * math.prod(sides) > images.memory() / 3:
        raise UserError(f"{n:,} such images need over a third of the memory: draw fewer")
    if sides != trained:
        was = "x".join(map(str, trained))
        print(f"note: trained on {was}; how good another size looks is not promised")
    return (channels, *sides)


def check_overrides(rows, sampler, **overrides):
    """Those of the method's flags that are given; UserError where they would do nothing."""
    asked = {name: value for name, value in overrides.items() if value is not None}
    for name in asked:
        for method in [row.method for row in rows]:
            kind = type(method).__name__
            if sampler != "own" or not hasattr(method, name):
                raise UserError(f"--{name} does not suit --sampler {sampler} of {kind}")
            if name == "variance" and getattr(method, "learned", False):
                raise UserError(f"--variance does not suit {kind} with a learned variance")
    return asked


def chain(method, sampler, options, shape):
    """The sampler under `options` as a function of (noise, y, randn_like=...).

    shape: (C, H, W). UserError for options that it cannot take; its first step is tried.
    """
    kind = type(method).__name__
    run = method.sample
    if sampler != "own":
        run = functools.partial(ode_sample, denoiser(method))
    known = flags_of(ode_sample if sampler != "own" else type(method).sample)
    options = {name: drawing.to_number(value) for name, value in options.items()}
    for name, value in options.items():
        kinds = known[name].annotation if name in known else None
        if not (flags.matches(value, kinds) or flags.matches(str(value), kinds)):
            raise UserError(f"--{name} {value} does not suit the sampler of {kind}")
    if isinstance(options.get("steps"), int):
        check_range("steps", options["steps"], 1, 10**6)
    run = functools.partial(run, **SAMPLERS[sampler] | options)
    noise = torch.ones(1, *shape, device=next(method.parameters()).device)
    try:
        x, _ = next(run(noise))
    except (ValueError, OverflowError) as error:
        raise UserError(f"the sampler refuses: {error}") from error
    if not x.isfinite().all():
        raise UserError("the sampler's first step is not finite: an option is out of range")
    return run


# Where it is written

def prepare(out, path, name, suffix):
    """Where to write: a file that ends in `suffix`, or a folder; the folders above are made."""
    named = out is not None
    out = Path(out) if named else drawing.run_folder(path) / "samples" / f"{name}{suffix}"
    if suffix == ".html":
        if out.is_file() and b'content="sample.py"' not in out.read_bytes()[:300]:
            raise UserError(f"{out} is there and is no page of sample.py: choose another name")
        drawing.prepare(out, suffix, named, "--html")
    elif suffix != ".png" or out.suffix.lower() in (".png", ".npy", ".gif"):
        drawing.prepare(out, suffix[-4:], named)
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} must end in .png, or be a new or empty folder")
    else:
        drawing.make_folder(out)
    return out


def write(drawn, rows, numbers, out):
    """Write a picture, an animation, latents or, where `out` is a folder, numbered files."""
    suffix = out.suffix.lower()
    labels = [row.name for row in rows] if len(rows) > 1 else ()
    if suffix == ".gif":
        images.save_gif(list(drawn[0].values()), out)
    elif suffix == ".npy":
        with checkpoint.written_whole(out) as file:
            np.save(file, torch.cat(drawn).numpy())
    elif isinstance(drawn[0], dict):
        images.save_strip(list(drawn[0].values()), out)
    elif out.is_dir():
        for row, pictures in zip(rows, drawn):
            folder = out / drawing.as_file_name(row.name) if labels else out
            folder.mkdir(exist_ok=True)
            for number, picture in zip(numbers, pictures):
                images.save(images.to_image(picture), folder / f"{number:06d}.png")
    else:
        columns = len(numbers) if labels else None
        images.save_grid(torch.cat(drawn), out, columns, labels)


# The command line

def parse(argv, function, doc, program):
    """(run, its checkpoint, the sampler's options, the function's arguments) of a command."""
    asks_help = not argv or argv[0] in ("-h", "--help")
    if not asks_help and argv[0].startswith("-"):
        raise UserError(f"the run comes first: python {program} runs/pdm [flags]")
    first = Parser(add_help=False)
    first.add_argument("--sampler", choices=SAMPLERS, default="own")
    sampler = first.parse_known_args(argv)[0].sampler
    parser = Parser(prog=program, usage=f"python {program} RUN [flags]", description=doc)
    names = add_flags(parser, program.removesuffix(".py"), function)
    if asks_help:
        parser.print_help()
        sys.exit()

    saved = checkpoint.read(argv[0])
    method = saved["method"]
    own = checkpoint.METHODS[method].sample
    used, other = (own, ode_sample) if sampler == "own" else (ode_sample, own)
    needed = "heun, euler or churn" if sampler == "own" else "own"
    add_flags(parser, f"sampler {sampler} of {method}", used, SAMPLERS[sampler])
    hints = checkpoint.flags_elsewhere(method) | REPLACED
    hints |= {name: f"--{name} goes with --sampler {needed}" for name in flags_of(other)}
    given = parser.parse(argv[1:], hints)
    options = {name: value for name, value in given.items() if name not in names}
    arguments = {name: value for name, value in given.items() if name in names}
    return argv[0], saved, options, arguments


def main(argv):
    join()
    path, saved, options, given = parse(argv, sample, __doc__, "sample.py")
    sample(path, options, saved, **given)


if __name__ == "__main__":
    flags.run(main)
