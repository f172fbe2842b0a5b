"""What can be known to be wrong before memory is asked for: values, sizes, tensors of a file.

All raise UserError with one line that says what would be right.
"""
import numpy as np
import torch

from .flags import UserError, flags_of, matches

RANGES = dict(
    size=(1, 8192), steps=(1, 1e9), batch=(1, 1e6), accumulate=(1, 1e6), every=(1, 1e9),
    keep=(0, 1e6), grid=(1, 4096), overfit=(0, 1e9), seed=(0, 2 ** 63), lr=(0, 1),
    beta_2=(0, 1 - 1e-9), warmup=(0, 1e9), decay=(0, 1e9), cooldown=(0, 1e9), ema=(0, 1),
    clip_grad=(0, 1e9), drop_label=(0, 1), width=(2, 1e5), mults=(1 / 64, 64),
    blocks=(1, 100), dropout=(0, 1), patch=(1, 1024), T=(2, 1e6), sigma_data=(1e-6, 1e6),
    P_mean=(-100, 100), P_std=(0, 100), augment=(0, 1), p_full=(0, 1), lambda_vlb=(0, 1e6),
)
MOST_PARAMETERS = 4e9
MOST_LEVELS = 12


# Flags and sizes

def check_ranges(config):
    """UserError for the first flag whose value lies outside its range."""
    for name, (low, high) in RANGES.items():
        for value in np.atleast_1d(config.get(name, low)):
            if not low <= value <= high:
                span = f"between {low:g} and {high:g}"
                raise UserError(f"--{name} must lie {span}, got {value}")


def check_types(config, functions):
    """UserError for the first value that is not of its flag's type."""
    for function in functions:
        for name, parameter in flags_of(function).items():
            default = parameter.default
            value = config.get(name, default)
            is_default = type(value) is type(default) and value == default
            if not is_default and not matches(value, parameter.annotation):
                raise UserError(f"--{name} cannot be {value!r:.60}")


def check_levels(width, mults, attention):
    """UserError for a U-Net without channels, with too many levels, or attention at none."""
    if not 1 <= len(mults) <= MOST_LEVELS:
        raise UserError(f"--mults wants 1 to {MOST_LEVELS} levels, got {len(mults)}")
    if int(width * min(mults)) < 1:
        raise UserError(f"--width {width} times --mults {min(mults):g} leaves no channels")
    if not all(0 <= level < len(mults) for level in attention):
        levels = " ".join(map(str, attention))
        raise UserError(
            f"--attention names levels of the U-Net, 0 to {len(mults) - 1} with these --mults, "
            f"got {levels}"
        )


def check_size(sides, multiple, levels, flag="--size"):
    """UserError with the nearest legal sizes where multiple x 2^(levels-1) does not divide."""
    k = multiple * 2 ** (levels - 1)
    if all(side % k == 0 for side in sides):
        return
    below = [max(k, side // k * k) for side in sides]
    above = [-(-side // k) * k for side in sides]
    nearest = [below] if below == above else [below, above]
    choices = " or ".join(sides_as_words(choice) for choice in nearest)
    why = f"2^{levels - 1} for {levels} levels"
    if multiple > 1:
        why = f"{multiple} for the method's patches or crops x {why}"
    raise UserError(
        f"image size {'x'.join(map(str, sides))} is not divisible by {k} ({why}): "
        f"choose {flag} {choices}, or other --mults"
    )


def sides_as_words(sides):
    """8 for a square, 8 12 for other images."""
    return " ".join(map(str, sides if len(set(sides)) > 1 else sides[:1]))


def check_room(method):
    """The number of parameters; UserError where no computer here would hold them."""
    parameters = sum(weight.numel() for weight in method.parameters())
    if parameters > MOST_PARAMETERS:
        raise UserError(
            f"a network of {parameters:,} parameters; {MOST_PARAMETERS:,.0f} are the most: "
            "lower --width, --mults or --blocks"
        )
    return parameters


# The tensors of a checkpoint

def check_weights(what, weights, method):
    expected = method.state_dict()
    if weights.keys() != expected.keys():
        raise UserError(f"its {what} are not those of its flags")
    for name, weight in expected.items():
        check_tensor(f"{what}, {name}", weights[name], weight.shape, weight.dtype)


def check_optimizer(state, weights):
    """Adam's state of each weight: step and two moments; none where it was never trained."""
    for i, moments in state.items():
        if type(i) is not int or not 0 <= i < len(weights) or type(moments) is not dict:
            raise UserError("its optimizer has other weights")
        if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError("its optimizer is not Adam")
        check_tensor("optimizer, step", moments["step"], torch.Size(), torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            check_tensor("optimizer", moments[name], weights[i].shape, weights[i].dtype)


def check_tensor(what, tensor, shape, dtype):
    """UserError unless it is a plain tensor of this shape and type that fills its memory."""
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    plain = plain and tensor.device.type == "cpu"
    if not plain or tensor.shape != shape or tensor.dtype != dtype:
        raise UserError(f"its {what} is not the tensor that its flags ask for")
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not (tensor.is_contiguous() or last):
        raise UserError(f"its {what} is laid out in another way in memory")
