"""The list of methods; building one; a run on disk: written whole, read as data, checked."""
import contextlib
import csv
import os
import re
import sys
import zlib
from pathlib import Path

import torch

from ddpm import DDPM
from edm import EDM
from iddpm import IDDPM
from patch_diffusion import PatchDiffusion
from pdm import PDM
from unet import UNet

from . import device as devices
from .checks import (
    check_levels,
    check_optimizer,
    check_ranges,
    check_room,
    check_size,
    check_types,
    check_weights,
)
from .flags import UserError, flags_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# Another paper is one line more.
METHODS = {
    "ddpm": DDPM,
    "iddpm": IDDPM,
    "pdm": PDM,
    "edm": EDM,
    "patch_diffusion": PatchDiffusion,
}

# What minutes on a CPU want, not the signatures' defaults: experiments/choices.md
SHORT = dict(batch=16, lr=1e-3, decay=0, steps=6000, cooldown=3000)
DEEP = SHORT | dict(width=24, mults=(1, 2, 3, 4), attention=(3,))
CROPS = SHORT | dict(width=32, mults=(1, 2, 4), attention=(2,))  # of 4x4 and more: halved twice
PATCHES = SHORT | dict(data="digits64", mults=(1, 2, 2), attention=(2,))
SMALL_RUN = {
    "ddpm": DEEP,
    "iddpm": DEEP,
    "pdm": PATCHES | dict(steps=5000, cooldown=2500, variance="small"),
    "edm": DEEP | dict(P_mean=0.0),
    "patch_diffusion": CROPS | dict(P_mean=0.0),
}

VERSION = 4  # of the layout below
LAYOUT = dict(
    version=int,  # VERSION
    method=str,  # key of METHODS
    config=dict,  # {flag: value}
    shape=list,  # C, H, W of an image
    classes=list,  # their names; empty without --conditional
    latents=bool,  # whether the data are floats, not pixels
    fingerprint=int,  # crc32 of the images
    model=dict,  # {name: tensor}
    ema=dict,  # the averaged weights, likewise
    optimizer=dict,  # {number of the weight: Adam's state}
    step=int,
    images=int,  # seen
    seconds=float,  # of training
    sizes=dict,  # {size: steps}, for methods that train on crops
    losses=list,  # of the steps since the last row
    log=list,  # rows of log.csv
    checksum=int,  # of all tensors; see checksum()
)
NUMBERED = re.compile(r"ckpt-(\d{6,})\.pt")


# Building a method

def build(about, device="cpu"):
    """The untrained method that dict(method, config, shape, classes) describes.

    With device "meta" its network takes no memory. Flags that config lacks have their defaults.
    UserError for values out of range, too large a network, sizes that do not go together.
    """
    cls = METHODS[about["method"]]
    unet = arguments_of(UNet, about["config"])
    arguments = arguments_of(cls, about["config"])
    check_ranges(unet | arguments)
    check_levels(unet["width"], unet["mults"], unet["attention"])
    classes = len(about["classes"])

    def make_net(in_channels, out_channels):
        with torch.device(device):
            return UNet(in_channels, out_channels, **unet, classes=classes)

    try:
        method = cls(make_net, about["shape"][0], **arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    # What must divide an image's sides besides the U-Net's depth: patches, quarter crops
    multiple = getattr(method, "size_multiple", 1)
    check_size(about["shape"][1:], multiple, len(unet["mults"]))
    return method


def arguments_of(function, config):
    """Those of a config's values that are arguments of the function."""
    return {name: config.get(name, p.default) for name, p in flags_of(function).items()}


def levels_of(about):
    """The number of levels of its U-Net."""
    return len(arguments_of(UNet, about["config"])["mults"])


# Writing

def write(run, checkpoint, keep=0):
    """Write ckpt.pt and log.csv into the run's folder, each whole or not at all.

    checkpoint: LAYOUT without version and checksum. With `keep` also ckpt-<step>.pt, of which
    so many older ones stay. UserError on a full disk; the files of before stay then.
    """
    tensors = {name: to_cpu(checkpoint[name]) for name in ("model", "ema", "optimizer")}
    checkpoint = dict(version=VERSION) | checkpoint | tensors
    checkpoint["checksum"] = checksum(checkpoint)
    names = ["ckpt.pt"]
    if keep:
        names = [f"ckpt-{checkpoint['step']:06d}.pt", "ckpt.pt"]
    for name in names:
        with written_whole(run / name) as file:
            torch.save(checkpoint, file)
    write_log(run, checkpoint["log"])
    if keep:
        numbered = {int(m[1]): m[0] for m in map(NUMBERED.fullmatch, os.listdir(run)) if m}
        for step in sorted(numbered)[: -keep - 1]:
            (run / numbered[step]).unlink()


def to_cpu(tensors):
    """A dict of tensors, or of dicts of them, with all on the CPU and without gradients."""
    if isinstance(tensors, dict):
        return {name: to_cpu(value) for name, value in tensors.items()}
    return tensors.detach().cpu()


def write_log(run, rows):
    """log.csv, once there are rows; a column that earlier rows lack is 0 in them."""
    if not rows:
        return
    columns = dict.fromkeys(name for row in rows for name in row)
    with written_whole(run / "log.csv", "w") as file:
        writer = csv.DictWriter(file, columns, restval=0, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def written_whole(path, mode="wb"):
    """A file to write, which takes the place of `path` at the end, and only then.

    After an error the old file stays; UserError on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a full disk a RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path}, the one before it stays: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run):
    """While it is open no other process can train in this folder: UserError there.

    The system lets go of the lock when the process ends, however it ends.
    """
    if devices.rank() > 0:
        yield
        return
    path = run / "ckpt.lock"
    file = open(path, "a")  # on Windows a locked file cannot be cut to nothing
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        file.close()
        raise UserError(f"another process is training in {run} now") from None
    try:
        yield
    finally:
        file.close()
        path.unlink(missing_ok=True)


def checksum(checkpoint):
    """crc32 over the bytes of the model's, the average's and the optimizer's tensors."""
    crc = 0
    for part in ("model", "ema", "optimizer"):
        for _, tensor in tensors_of(checkpoint[part]):
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            crc = zlib.crc32(data.numpy(), crc)
    return crc


def tensors_of(tree):
    """(names, tensor) of a dict of tensors, or of dicts of them, in the names' order."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from tensors_of(tree[name])
        else:
            yield name, tree[name]


# Reading

def load(path, *, ema=True, device=None, saved=None):
    """(method, checkpoint): the averaged weights, or the raw ones, of a file or a run's folder.

    The method is on the device, in eval mode, without gradients. saved: what `read` gave, where
    it has been read. UserError for what `read` refuses and for a device that is not here.
    """
    device = devices.pick(device)
    checkpoint = read(path) if saved is None else saved
    method = build(checkpoint)
    weights = checkpoint["ema"] if ema else checkpoint["model"]
    method.load_state_dict(weights)
    return devices.to_device(method, device).eval().requires_grad_(False), checkpoint


def read(path):
    """The dict that `write` wrote, from a file or a run's folder; nothing in it can run.

    UserError with one line for anything else: another layout, types or values that cannot be,
    tensors that are not those of its flags, or whose bytes have changed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint of this project: {reason}") from error
    check_layout(path, checkpoint)
    try:
        check_content(checkpoint)
    except UserError as error:
        raise UserError(f"{path} does not fit this version: {error}") from error
    if checksum(checkpoint) != checkpoint["checksum"]:
        raise UserError(f"{path} is damaged: its tensors are not those that were written")
    return checkpoint


def check_layout(path, checkpoint):
    """UserError unless it is a dict of this version, with all keys and their types."""
    foreign = f"{path} is not a checkpoint of this project"
    if type(checkpoint) is not dict or checkpoint.keys().isdisjoint(LAYOUT):
        raise UserError(foreign)
    version = checkpoint.get("version", 1)
    if type(version) is int and version != VERSION:
        raise UserError(f"{path} has layout {version}; this version reads layout {VERSION}")
    for name, kind in LAYOUT.items():
        if type(checkpoint.get(name)) is not kind:
            raise UserError(f"{foreign}: no {name}, or of another type")
    if checkpoint["method"] not in METHODS:
        raise UserError(f"{foreign}: no method {checkpoint['method']!r:.60}")


def check_content(checkpoint):
    """UserError unless shapes, flags, log and tensors are such as training writes."""
    shape = checkpoint["shape"]
    if len(shape) != 3 or not all(type(n) is int and 0 < n <= 8192 for n in shape):
        raise UserError(f"no image has the shape {shape!r:.60}")
    if not all(type(name) is str for name in checkpoint["classes"]):
        raise UserError("its class names are no words")
    check_log(checkpoint)
    check_data(checkpoint["config"])
    check_types(checkpoint["config"], (METHODS[checkpoint["method"]], UNet))
    method = build(checkpoint, "meta")
    check_room(method)
    check_weights("weights", checkpoint["model"], method)
    check_weights("averaged weights", checkpoint["ema"], method)
    check_optimizer(checkpoint["optimizer"], list(method.parameters()))


def check_log(checkpoint):
    """UserError unless what was counted and logged are numbers, in rows of named columns."""
    numbers = [checkpoint["losses"], checkpoint["sizes"], checkpoint["sizes"].values()]
    numbers.append([checkpoint["step"], checkpoint["images"]])
    for row in checkpoint["log"]:
        if type(row) is not dict or not {"images", "seconds"} <= row.keys():
            raise UserError("its log has no rows")
        if not all(type(name) is str for name in row):
            raise UserError("its log has no names of columns")
        numbers.append(row.values())
    if not all(is_number(value) for values in numbers for value in values):
        raise UserError("its log holds something else than numbers")
    if checkpoint["step"] < 0 or checkpoint["images"] < 0:
        raise UserError("its step lies before the first")


def is_number(value):
    """A float, or an integer that one can hold."""
    return type(value) is float or type(value) is int and abs(value) < 2**63


def check_data(config):
    """UserError unless the config says what was trained on, which all commands ask."""
    if type(config.get("data")) is not str or type(config.get("overfit")) is not int:
        raise UserError("it does not say what it was trained on")
    check_ranges(dict(overfit=config["overfit"]))


def restore_optimizer(optimizer, state):
    """Give Adam a saved state {number: moments}, laid out in memory as the weights are now.

    A moment laid out otherwise would give silently wrong steps in the fused Adam.
    """
    weights = optimizer.param_groups[0]["params"]
    as_weights = {}
    for i, moments in state.items():
        as_weights[i] = dict(step=moments["step"].clone())
        for name in ("exp_avg", "exp_avg_sq"):
            as_weights[i][name] = torch.empty_like(weights[i]).copy_(moments[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(dict(state=as_weights, param_groups=groups))


# What a command line says of methods

def doc_of(name):
    """The first paragraph of a paper's file."""
    doc = sys.modules[METHODS[name].__module__].__doc__ or METHODS[name].__name__
    return doc.split("\n\n")[0]


def overview(doc):
    """A command's help without a method: its doc and the list of them."""
    lines = [f"    {name:16} {doc_of(name).splitlines()[0]}" for name in METHODS]
    return "\n".join([doc, *lines])


def check_name(name, argv):
    """UserError unless the name that argv gives is a method's."""
    choices = ", ".join(f"--method {key}" for key in METHODS)
    if name is None and argv[0] in METHODS:
        raise UserError(f"did you mean --method {argv[0]}?")
    if name is None:
        raise UserError(f"choose a method: {choices}")
    if name not in METHODS:
        raise UserError(f"no method {name}: choose {choices}")


def flags_elsewhere(method):
    """{flag: sentence} of the flags that belong to other methods than this one."""
    owners = {}
    for name, cls in METHODS.items():
        for flag in flags_of(cls) | flags_of(getattr(cls, "sample", cls)):
            owners.setdefault(flag, []).append(name)
    hints = {name: f"did you mean --method {name}?" for name in METHODS}
    for flag, names in owners.items():
        if method not in names:
            hints[flag] = f"--{flag} belongs to {', '.join(names)}, not to {method}"
    return hints
