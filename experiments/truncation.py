"""Fine solutions of EDM's ODE, and single steps beside them."""
import math

import torch

from edm import noise_range, ode_sample, rounded, sigma_steps, widest_float
from experiments.report import curves_of, plot, write
from plumbing.device import seeded_noise
from plumbing.drawing import last
from plumbing.flags import UserError


def check_rising(name, values):
    """UserError where a flag's values are not two or more that rise."""
    if len(values) < 2 or list(values) != sorted(set(values)):
        raise UserError(f"--{name} takes two or more numbers that rise, as 5 9 18")


def check_levels(D, path):
    """UserError where D knows some noise levels only, for a fine solution asks for all."""
    levels = sigma_steps(18, "edm", *noise_range("edm", None, None, D))
    if not torch.equal(rounded(D, levels), levels):
        raise UserError(f"{path} knows some noise levels only; EDM's own network knows all")


def noise_of(method, shape, n):
    """(n, C, H, W), in the widest float that the method's device has."""
    device = next(method.parameters()).device
    noise = seeded_noise([(0, i) for i in range(n)])(torch.empty(n, *shape, device=device))
    return noise.to(widest_float(device))


def reference(D, noise, steps, rho):
    """x (n, C, H, W) at `steps` noise levels, from sigma_max * noise on, and at 0."""
    sigma_max = noise_range("edm", None, None, D)[1]
    xs = [sigma_max * noise]
    xs += [x for x, _ in ode_sample(D, noise, steps=steps, rho=rho)]
    return xs


def heun_step(D, x, t, t_next):
    """x (B, C, H, W) after one step of Algorithm 1 from the noise level t to t_next > 0."""
    x_next, _ = next(ode_sample(D, x / t, steps=2, sigma_max=t, sigma_min=t_next))
    return x_next


def step_errors(D, noise, steps, fine, rho):
    """{noise level where a step of Heun ends: its rmse}, each begun on a fine solution.

    fine: steps of that solution in one of ours.
    """
    sigmas = sigma_steps(steps, "edm", *noise_range("edm", None, None, D), rho)
    xs = reference(D, noise, (steps - 1) * fine + 1, rho)[::fine]
    errors = {}
    levels = sigmas.tolist()
    for t, t_next, x, x_next in zip(levels, levels[1:], xs, xs[1:]):
        errors[t_next] = rmse(heun_step(D, x, t, t_next), x_next)
    return errors


def solution_errors(D, noise, lengths, solver, end):
    """{evaluations of the network: rmse} of solutions in N steps each, beside the true end."""
    errors = {}
    for N in lengths:
        cost = N if solver == "euler" else 2 * N - 1
        errors[cost] = rmse(last(ode_sample(D, noise, steps=N, solver=solver)), end)
    return errors


def rmse(x, y):
    """Over all images and pixels, which lie in [-1, 1]."""
    return (x - y).double().square().mean().sqrt().item()


def order(errors, lengths):
    """p where the error falls as h^p, by the two longest solutions."""
    return math.log(errors[-2] / errors[-1]) / math.log(lengths[-1] / lengths[-2])


def save(path, rows, note):
    """A table whose columns are a name, the x of its curve and rmse; a plot beside it."""
    write(path, rows, note)
    name, x, y = rows[0]
    plot(path.with_suffix(".png"), curves_of(rows, name, x, y), x, y, "xy")
