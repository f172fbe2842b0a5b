"""What every method must have (docs/add_a_paper.md), tried once before the first step."""
import copy
import inspect

import torch
from torch import nn

from edm import denoiser

from .flags import UserError

SAMPLE = "sample(noise, y, ..., randn_like)"
OWN_DENOISER = ("sigma_min", "sigma_max", "round_sigma")


def dry_pass(method, about):
    """Try loss, denoiser and one step of the sampler on two images of the run's shape.

    about: dict(shape, classes). It runs on a copy: the method's state stays. UserError that
    names what is missing. Returns whether an image trains some of the weights only, as in a
    split chain.
    """
    check_parts(method)
    method = copy.deepcopy(method)
    R = min(about["shape"][1:])
    crop = [method.draw_size(R, 0.0)] if hasattr(method, "draw_size") else []
    device = next(method.parameters()).device
    x = torch.randn(2, *about["shape"]).clamp(-1, 1).to(device)
    y = torch.tensor([-1, 0], device=device) if about["classes"] else None
    one = y[:1] if about["classes"] else None
    try:
        try_loss(method, x, y, crop)
        method.loss(x[:1], one, *crop).backward()
        with torch.no_grad():
            try_denoiser(method, x, y)
            try_sampler(method, x, y)
    except ValueError as error:
        raise UserError(str(error)) from error
    return any(weight.grad is None for weight in method.parameters())


def check_parts(method):
    """UserError for the first part of the contract that the method lacks."""
    if not isinstance(getattr(method, "net", None), nn.Module):
        raise UserError(lacks(method, "self.net, which make_net makes"))
    for name, part in (("loss", "loss(x, y)"), ("sample", SAMPLE)):
        if not callable(getattr(method, name, None)):
            raise UserError(lacks(method, part))
    try:
        inspect.signature(method.sample).bind("noise", "y", randn_like=torch.randn_like)
    except TypeError as error:
        raise UserError(lacks(method, f"{SAMPLE}: {error}")) from error
    if hasattr(method, "D"):
        for name in OWN_DENOISER:
            if not hasattr(method, name):
                raise UserError(lacks(method, f"{name}, which goes with its D"))
    elif not (hasattr(method, "alpha_bar") and hasattr(method, "predict")):
        raise UserError(lacks(method, "D(x, sigma, y), nor alpha_bar and predict(x_t, t, y)"))


def lacks(method, part):
    return f"{type(method).__name__} has no {part}: see docs/add_a_paper.md"


def try_loss(method, x, y, crop):
    loss = method.loss(x, y, *crop)
    if not torch.is_tensor(loss) or loss.shape != () or not loss.requires_grad:
        raise UserError(lacks(method, "loss(x, y) that gives one number with a gradient"))


def try_denoiser(method, x, y):
    D = denoiser(method)
    if shape_of(D(x, D.round_sigma(1.0), y)) != x.shape:
        raise UserError(lacks(method, "denoiser D(x, sigma, y) of the shape of x"))


def try_sampler(method, x, y):
    steps = method.sample(x, y, randn_like=torch.randn_like)
    if not hasattr(steps, "__next__"):
        raise UserError(lacks(method, f"{SAMPLE} that yields (x, x_0_hat) after each step"))
    pair = next(steps, None)
    if not isinstance(pair, tuple) or [shape_of(one) for one in pair] != [x.shape, x.shape]:
        raise UserError(lacks(method, f"{SAMPLE} whose x and x_0_hat have the noise's shape"))


def shape_of(tensor):
    return getattr(tensor, "shape", None)
