"""Drawing images with a method: its guidance, its cost, its batches and its processes."""
import contextlib
import math
import re
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from unet import Guided

from .device import rank, seeded_noise, world
from .flags import UserError, lacks_memory

MOST_FRAMES = 60  # of a chain, in an animation or on a page


# Round the network, for the time of the sampling

@contextlib.contextmanager
def changed(method, **attributes):
    """While it is open, these attributes of the method (net, clip, variance) are others."""
    before = {name: getattr(method, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(method, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(method, name, value)


@contextlib.contextmanager
def guided(method, w):
    """While it is open, the method draws with classifier-free guidance of weight w."""
    net = method.net if w == 1 else Guided(method.net, w)
    with changed(method, net=net):
        yield


@contextlib.contextmanager
def counted(method, n):
    """While it is open, the work on n images is counted; yields its Cost, known at the end."""
    counter = Counter(method.net)
    cost = Cost(n)
    start = time.time()
    with changed(method, net=counter):
        yield cost
    cost.seconds_per_image = (time.time() - start) / n
    cost.nfe = counter.images / len(share_of(n))


class Counter(nn.Module):
    """A network that counts the images it is shown."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.images = 0

    def forward(self, x, c_noise, y=None):
        self.images += len(x)
        return self.net(x, c_noise, y)


@dataclass
class Cost:
    """Network evaluations and seconds for each of n images."""

    n: int
    nfe: float = 0.0
    seconds_per_image: float = 0.0

    def __str__(self):
        seconds = f"{self.seconds_per_image:.3f} s"
        images = "1 image" if self.n == 1 else f"{self.n} images"
        return f"{images}, {self.nfe:.0f} network evaluations and {seconds} each"


# Images

def draw(run, shape, keys, batch=64, labels=None, device="cpu"):
    """Images (n, C, H, W) in [-1, 1], on the CPU; image k depends on keys[k], (seed, i), alone.

    run(noise, y, randn_like=...) is a sampler that yields (x, x_0_hat); shape: (C, H, W);
    labels: (n,) or None. Where torchrun started several processes each draws its share.
    """

    def part(indices):
        noise = seeded_noise([keys[k] for k in indices])
        x_T = noise(torch.empty(len(indices), *shape, device=device))
        y = None if labels is None else labels[indices].to(device)
        for step in run(x_T, y, randn_like=noise):
            x, _ = step
            bar.update()
        return x.float().cpu()

    with tqdm(unit=" steps", disable=rank() > 0) as bar:
        return in_batches(part, len(keys), batch)


def last(chain):
    """The images (B, C, H, W) with which a sampler that yields (x, x_0_hat) ends."""
    for step in chain:
        x, _ = step
    return x


def record(run, shape, keys, labels=None, device="cpu", most=MOST_FRAMES):
    """{step: (x, x_0_hat)} along the chain, evenly spaced, the last always among them.

    At most `most` + 1 pairs (n, C, H, W), on the CPU; other arguments as in `draw`.
    """
    noise = seeded_noise(keys)
    x_T = noise(torch.empty(len(keys), *shape, device=device))
    y = None if labels is None else labels.to(device)
    steps = run(x_T, y, randn_like=noise)
    frames = {}
    stride = 1
    for step, (x, x_0_hat) in enumerate(tqdm(steps, unit=" steps", disable=rank() > 0)):
        if step % stride == 0 and len(frames) == most:
            frames = {k: frames[k] for k in list(frames)[::2]}
            stride = 2 * stride
        if step % stride == 0:
            frames[step] = (x.float().cpu(), x_0_hat.float().cpu())
    return frames | {step: (x.float().cpu(), x_0_hat.float().cpu())}


def from_noise(run):
    """A sampler that yields each x before its step, with the x_0_hat made from it.

    So it begins with the noise; at the end it yields the sample twice.
    """

    def states(noise, y=None, **options):
        x = noise
        for x_next, x_0_hat in run(noise, y, **options):
            yield x, x_0_hat
            x = x_next
        yield x, x

    return states


def share_of(n):
    """Which of n images this process draws; the shares of all processes have one length."""
    length = math.ceil(n / world())
    start = rank() * length
    return [min(k, n - 1) for k in range(start, start + length)]


def in_batches(function, n, batch):
    """(n, ...) on the CPU, of function(indices) over 0..n-1, `batch` at a time.

    Fewer where memory is short. Every process works on its share and gets the whole.
    """
    share = share_of(n)
    parts = []
    done = 0
    while done < len(share):
        try:
            parts.append(function(share[done : done + batch]))
            done += batch
            continue
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            if batch == 1:
                advice = "not one image fits in memory: try a smaller --size, or --device cpu"
                raise UserError(advice) from None
        batch = batch // 2
        torch.cuda.empty_cache()  # cuDNN and cuBLAS take theirs from what it leaves
    part = torch.cat(parts)
    if world() == 1:
        return part
    everyone = [torch.empty_like(part) for _ in range(world())]
    torch.distributed.all_gather(everyone, part)
    return torch.cat(everyone)[:n]


# What a command line asks for

def keys_of(seed, seeds, n, default_n=64):
    """[(seed, i), ...], one an image: of --seeds such as 0-63,100, or of --seed and --n."""
    if seeds is None:
        n = default_n if n is None else n
        check_range("n", n, 1, 10**6)
        check_range("seed", seed, 0, 2**63)
        return [(seed, i) for i in range(n)]
    if not re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*", seeds):
        raise UserError(f"--seeds reads like 0-63,100, got {seeds}")
    if n is not None:
        raise UserError("--seeds says by itself how many images there are: leave out --n")
    ranges = [[int(k) for k in part.split("-")] for part in seeds.split(",")]
    count = sum(max(0, part[-1] - part[0] + 1) for part in ranges)
    if not 1 <= count <= 10**6:
        raise UserError(f"--seeds {seeds} are {count:,} seeds; give 1 to 1,000,000")
    return [(s, 0) for part in ranges for s in range(part[0], part[-1] + 1)]


def choose_labels(n, class_, names):
    """Class indices (n,): of the class given, or of all in turn; None where `names` is empty.

    class_: (), or one name or number in a tuple. UserError for a class that is not there.
    """
    if not names:
        if class_:
            raise UserError("--class needs a model trained with --conditional")
        return None
    if not class_:
        return torch.arange(n) % len(names)
    (name,) = class_
    if name in names:
        return torch.full((n,), names.index(name))
    if name.isdecimal() and int(name) < len(names):
        return torch.full((n,), int(name))
    known = ", ".join(names[:20])
    raise UserError(f"no class {name}: choose one of {known}, or a number below {len(names)}")


def choose_guidance(method, w, labels):
    """The weight w, or the method's own if w is None; 1 without labels, which guide nothing."""
    if w is not None and not math.isfinite(w):
        raise UserError(f"--guidance must be a number, got {w}")
    if labels is None:
        if w not in (None, 1.0):
            raise UserError("--guidance needs a model trained with --conditional")
        return 1.0
    return getattr(method, "guidance", 1.0) if w is None else w


def check_range(flag, value, low, high):
    if not low <= value <= high:
        raise UserError(f"--{flag} must lie between {low:,} and {high:,}, got {value:,}")


def to_number(value):
    """Some papers name their steps by text ("ddim50"), others by a number: "50" suits both."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value


def guidance_note(labels, w):
    """What a report says of guidance; nothing where there are no classes."""
    return "" if labels is None else f", guidance {w:g}"


# Where a picture is written

def run_folder(path):
    """The folder of the run that a path names, itself or by a checkpoint in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def run_name(path):
    return run_folder(path).resolve().name


def picture_name(saved, words, made_by, parameters):
    """step003000-seed0-steps25: the checkpoint's step, some words, the flags that matter.

    made_by: {flag: value}; those that have the default of `parameters` (flags_of) are left out.
    """
    words = [f"step{saved['step']:06d}", *words]
    for flag, value in made_by.items():
        if flag not in parameters or value != parameters[flag].default:
            words.append(as_word(flag.rstrip("_"), value))
    name = as_file_name("-".join(words))
    if len(name.encode()) > 150:
        return f"{name[:50]}-{zlib.crc32(name.encode()):08x}"
    return name


def as_file_name(text):
    """The text without what may mean something in a path."""
    return re.sub(r"[^\w.,+-]+", "_", text).strip(".") or "_"


def as_word(flag, value):
    """steps25, guidance0-1-4, no-clip."""
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return flag + "-".join(str(one).removesuffix(".0") for one in values)


def prepare(path, ending, named, flag="--out"):
    """Make the folder of a file to write; `named`: by the user, who hears of an older file."""
    path = Path(path)
    if path.suffix.lower() != ending or path.is_dir():
        raise UserError(f"{flag} {path} must name a file that ends in {ending}")
    if named and path.is_file():
        print(f"note: {path} is there already and will be overwritten")
    make_folder(path.parent)


def make_folder(folder):
    """Make a folder, and be sure before any work that files can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from error
