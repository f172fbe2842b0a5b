"""Beginning a run with the weights of another one (--init)."""
import torch

from unet import UNet

from .checkpoint import arguments_of, read
from .flags import UserError, as_flag

# The U-Net's outer layers; their sides (0 out, 1 in) whose channels are an image's
ENDS = {"conv_in": {1}, "conv_out": {0}, "straight": {0, 1}, "gate": {0}, "scale": {0}}


def take_weights(method, path, about):
    """Give a new method the averaged weights of another run, as far as they fit.

    about: dict(config, shape, classes) of the new one. Returns one line that says what was
    taken. UserError for what `read` refuses, and where nothing fits.
    """
    saved = read(path)
    network = " ".join(as_flag(*flag) for flag in arguments_of(UNet, saved["config"]).items())
    names = {"whole": [], "in part": [], "new": []}
    weights = {}
    for name, new in method.state_dict().items():
        how, weights[name] = first_weight(name, new, saved, about)
        names[how].append(name)
    if len(names["new"]) == len(weights):
        raise UserError(f"nothing in {path} fits: it is {saved['method']}, {network}")
    method.load_state_dict(weights)
    names["left"] = [name for name in saved["ema"] if name not in weights]
    line = f"taken from {path}: {len(names['whole'])} of {len(weights)} tensors"
    for how in ("in part", "new", "left"):
        if names[how]:
            line += f"; {how}: {first_few(names[how])}"
    if len(names["new"]) > len(weights) / 2:
        line += f"; its network is {network}"
    return line


def first_few(names):
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest


def first_weight(name, new, saved, about):
    """What a new tensor begins as, and how much of that is the saved one's.

    In part: classes that are others, and the U-Net's ends where the image's channels are the
    same but not what is read or said beside them. The new network then says what the old did.
    """
    old = saved["ema"].get(name)
    parent, _, _ = name.rpartition(".")  # net.conv_in of net.conv_in.weight
    layer = parent.split(".")[-1]
    if layer == "label" and saved["classes"] != about["classes"]:
        return embeddings(old, new, saved["classes"], about["classes"])
    if old is None:
        return "new", new
    if old.shape == new.shape:
        return "whole", old
    if layer in ENDS and old.dim() == new.dim() and channels_of(saved) == channels_of(about):
        sides = {side for side in range(old.dim()) if old.shape[side] != new.shape[side]}
        if sides <= ENDS[layer]:
            return "in part", in_first_channels(old, new, about["shape"][0])
    return "new", new


def channels_of(about):
    """What a network's first channels are: the image's, or the pixels of its patches."""
    return about["shape"][0], about["config"].get("patch")


def in_first_channels(old, new, C):
    """A weight of the U-Net's ends that is the old one where both have the channels.

    Outputs past the old ones stay as they are. Where the inputs are others, those past the
    image's C, such as coordinates, begin at 0.
    """
    rows = min(len(old), len(new))
    weight = new.clone()
    if old.shape[1:] == new.shape[1:]:
        weight[:rows] = old[:rows]
    else:
        weight[:rows] = 0
        weight[:rows, :C] = old[:rows, :C]
    return weight


def embeddings(old, new, before, now):
    """The embeddings of the classes `now`, for first_weight.

    A class that the old run knew by that name keeps its own; others begin as no class, row 0.
    """
    if old is None:
        return "new", torch.zeros_like(new)
    if old.shape[1] != new.shape[1]:
        return "new", new
    row_of = {name: 1 + k for k, name in enumerate(before)}
    rows = [0] + [row_of.get(name, 0) for name in now]
    return "in part", old[rows]
