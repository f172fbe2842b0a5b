"""A training run around its loop: what is checked first, how far it is, what ends it."""
import contextlib
import dataclasses
import math
import shutil
import signal
import sys
import time
import zlib

from tqdm import tqdm

from . import checkpoint, curves, datasets
from . import device as devices
from . import images as pixels
from .checkpoint import METHODS
from .device import rank, world
from .flags import UserError, as_flag

# What --resume may change; the data may move, not change.
FREE = {"steps", "every", "grid", "out", "resume", "device", "data", "keep", "compile"}
FREE |= {"cooldown"}
OF_THIS_MACHINE = {"out", "resume", "device", "compile"}  # not kept in the checkpoint


# Before the first step

def resumed(path, saved, config, given):
    """The saved config with the new values of flags that may change; UserError for others."""
    if "init" in given and given["init"] != saved.get("init"):
        raise UserError(f"--init begins a new run, --resume goes on with {path}: give one")
    for name, value in given.items():
        before = saved.get(name, config[name])
        if name not in FREE and before != value:
            raise UserError(
                f"--{name} is {before} in {path}; a resumed run cannot change it to {value}"
            )
    return config | saved | {name: value for name, value in given.items() if name in FREE}


def check_run(run, config, saved):
    """UserError for a batch that cannot be cut, a folder in use, a run that cannot go on."""
    processes = f" times {world()} processes" if world() > 1 else ""
    if config["batch"] % (config["accumulate"] * world()):
        cut = f"--accumulate {config['accumulate']}{processes}"
        raise UserError(f"{cut} must divide --batch {config['batch']}")
    if config["flip"] and config["data"] in datasets.BUILT_IN:
        raise UserError("--flip would teach mirrored digits; leave it out")
    if saved is None:
        if (run / "ckpt.pt").exists() or (run / "log.csv").exists():
            raise UserError(
                f"{run} holds a run already: --resume goes on with it, --out chooses another"
            )
        return
    if saved["step"] >= config["steps"]:
        raise UserError(f"{run} is at step {saved['step']} already: give a larger --steps")
    steps = saved["config"].get("steps")
    if config.get("sizes") == "progressive" and steps != config["steps"]:
        raise UserError(
            f"progressive patch sizes follow --steps, {steps} in {run}; "
            f"a resumed run cannot change it to {config['steps']}"
        )


def read_data(config, given, saved, device):
    """What is known of the run (`describe`), the images to train on, those held out."""
    size = config["size"] or None
    images, labels, classes = datasets.load(config["data"], size, config["channels"])
    about = describe(config, given, saved, images, labels, classes)
    if not config["conditional"]:
        labels = None
    return about, *prepare(images, labels, config["overfit"], device)


def describe(config, given, saved, images, labels, classes):
    """What build and load must know of a run; says what was loaded.

    UserError for images that are not those of the checkpoint, and for classes that are missing.
    """
    data = config["data"]
    if config["conditional"] and labels is None:
        raise UserError(
            f"--conditional needs classes: {data} has none (one sub-folder a class, or labels "
            "in an .npz)"
        )
    shape = list(images.shape[1:])
    some = pixels.to_float(images[:: len(images) // 1000 + 1])
    groups = "no" if labels is None else len(labels.unique())
    print(
        f"{data}: {len(images):,} images, {'x'.join(map(str, shape))}, {groups} classes, "
        f"mean {some.mean():.3f}, std {some.std():.3f}, "
        f"from {some.min():.3g} to {some.max():.3g}"
    )
    latents = images.is_floating_point()
    if latents:
        config = config | forced_by_latents(config["method"], given)
    facts = dict(
        shape=shape,
        classes=classes if config["conditional"] else [],
        latents=latents,
        fingerprint=zlib.crc32(images.numpy()),
    )
    if saved is not None and any(saved[name] != fact for name, fact in facts.items()):
        raise UserError(f"{data} does not hold the images and classes of the run")
    kept = {name: config[name] for name in config.keys() - OF_THIS_MACHINE}
    return dict(method=config["method"], config=kept) | facts


def forced_by_latents(name, given):
    """{flag: value} that latents force; UserError where the user asked for something else."""
    forced = getattr(METHODS[name], "latent_config", {})
    for flag, value in forced.items():
        if given.get(flag, value) != value:
            asked = as_flag(flag, given[flag])
            raise UserError(f"{asked} is for pixels; latents want {as_flag(flag, value)}")
    words = " ".join(as_flag(flag, value) for flag, value in forced.items())
    print(f"floats, so latents, used as they are; pixels are uint8. {words}".rstrip())
    return forced


def prepare(images, labels, overfit, device):
    """((images, labels) to train on, (images in [-1, 1], labels) held out), on the device."""
    total = len(images)
    (images, labels), (held, held_labels) = datasets.hold_out(images, labels, overfit)
    if total < 1000 and not overfit:
        held_too = "" if len(images) < total else "; none is held out, rmse_* are of these"
        print(f"note: so few images are soon learned by heart{held_too}")
    if devices.images_fit(images, device):
        images = images.to(device)
    if labels is not None:
        labels = labels.to(images.device)
        held_labels = held_labels.to(device)
    return (images, labels), (pixels.to_float(held).to(device), held_labels)


def begin(run, about, method, device, precision, keep):
    """Make the run's folder and say what is trained, where, and into which folder.

    UserError where the disk has no room for its checkpoints, and one more while it is written.
    """
    parameters = sum(weight.numel() for weight in method.parameters())
    room = 16 * (keep + 3) * parameters
    there = [folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists()]
    free = shutil.disk_usage(there[0]).free
    if free < room:
        needs = f"needs {room / 1e6:.0f} MB for its checkpoints"
        raise UserError(f"{run} {needs}; the disk has {free / 1e6:.0f} MB left")
    (run / "samples").mkdir(parents=True, exist_ok=True)
    processes = f"{world()} processes, " if world() > 1 else ""
    precision = devices.precision_on(device, precision)
    what = f"{about['method']}: {parameters:,} parameters"
    print(f"{what}, {device}, {precision}, {processes}to {run}/")


# While it runs

@dataclasses.dataclass
class Progress:
    """How far a run is; all of it lies in the checkpoint."""

    step: int = 0
    images: int = 0  # seen
    seconds: float = 0.0
    sizes: dict = dataclasses.field(default_factory=dict)  # {size: steps}
    losses: list = dataclasses.field(default_factory=list)  # since the last row
    log: list = dataclasses.field(default_factory=list)  # rows of log.csv

    def so_far(self):
        """{"loss", "images_per_s"} since the last row."""
        before = self.log[-1] if self.log else dict(images=0, seconds=0.0)
        seconds = max(1e-3, self.seconds - before["seconds"])
        loss = sum(self.losses) / len(self.losses)
        speed = (self.images - before["images"]) / seconds
        return dict(loss=round(loss, 5), images_per_s=round(speed, 1))

    def write_row(self, errors, lr):
        """Add a row to the log."""
        done = dict(step=self.step, images=self.images)
        so_far = self.so_far()
        speed = so_far.pop("images_per_s")
        rates = dict(lr=lr, images_per_s=speed, seconds=round(self.seconds, 3))
        shares = {}
        if len(self.sizes) > 1:  # crops
            for size in sorted(self.sizes, reverse=True):
                shares[f"share_{size}"] = round(self.sizes[size] / self.step, 4)
        self.log.append(done | so_far | errors | rates | shares)
        self.losses = []


@contextlib.contextmanager
def alone(run, config, saved):
    """While it is open no other process trains in this folder; UserError if one does or did."""
    with checkpoint.locked(run):
        check_run(run, config, saved)
        yield


def bar(progress, steps):
    options = dict(unit=" steps", mininterval=0.5, disable=rank() > 0)
    return tqdm(total=steps, initial=progress.step, **options)


class Stop:
    """While it is open, Ctrl-C and SIGTERM only ask: the step is finished and saved first.

    Another one, two seconds later, interrupts.
    """

    def __enter__(self):
        self.asked = None
        self.number = signal.SIGINT
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in signals}
        return self

    def ask(self, number, frame):
        # torchrun passes on a Ctrl-C that its processes have had already
        if self.asked and time.time() > self.asked + 2:
            raise KeyboardInterrupt
        self.asked = self.asked or time.time()
        self.number = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def state_of(method, averaged, optimizer, progress):
    """What a checkpoint holds besides its description."""
    return vars(progress) | dict(
        model=method.state_dict(),
        ema=averaged.state_dict(),
        optimizer=optimizer.state_dict()["state"],
    )


def save_pictures(run, progress, drawn):
    """Write a report's samples (n, C, H, W), those of all reports, and the curves."""
    pixels.save_grid(drawn, picture(run, progress.step))
    rows = math.ceil(len(drawn) / pixels.columns_of(drawn))
    curves.save_progress(run / "samples", rows, run / "samples" / "progress.png")
    curves.save_curves(progress.log, run / "curves.png")


def picture(run, step):
    return run / "samples" / f"{step:06d}.png"


# At the end

def say_what_next(run, step, steps, stop):
    """The paths written; exit code 130 or 143 where a signal stopped the run before its end."""
    path = run / "ckpt.pt"
    if step < steps:
        print(f"stopped at step {step}; {path} is written, --resume goes on")
        sys.exit(128 + stop.number)
    print(f"wrote {path}, {run / 'log.csv'} and {picture(run, step)}")
    print(f"now: python sample.py {path}")
