"""The numbers of a chain's steps beside the formulas that they enter, for sample.py --html.

Which they are follows from what the method, or its sampler, has.
"""
import inspect
import math
import re
from typing import NamedTuple

import torch

from edm import denoiser, noise_range, rounded, sigma_steps

CHAIN = {"alpha_bar", "kept_steps", "q_posterior"}  # what a method on steps t has
LEVELS = {"steps", "sigma_min", "sigma_max", "rho"}  # what a solver's noise levels hang on
ALGORITHM_2 = dict(schedule="linear", scaling="none", alpha=1.0)  # of a solver that has these
LETTERS = {
    "x_hat": "x\u0302",
    "sigma_hat": "\u03c3\u0302",
    "alpha_bar": "\u03b1\u0304",
    "sigma": "\u03c3",
    "alpha": "\u03b1",
    "eps": "\u03b5",
    "eta": "\u03b7",
    "sqrt": "\u221a",
    "x'": "x\u2032",
    " - ": " \u2212 ",
    "^2": "\u00b2",
}


class Numbers(NamedTuple):
    """Of a chain's N + 1 states, from noise on, and of the step that leads on from each."""

    formula: str  # of the step
    level: str  # what the curve shows
    curve: torch.Tensor  # (N + 1,)
    columns: dict  # {symbol: (N + 1,), or shorter where the last states have no such number}


def numbers_of(method, run, N):
    """Numbers of a sampler `run` that takes N steps: their count alone, if no more is known."""
    options = {name: p.default for name, p in inspect.signature(run).parameters.items()}
    numbers = None
    if LEVELS <= options.keys():
        numbers = of_solver(denoiser(method), options)
    elif all(hasattr(method, name) for name in CHAIN):
        numbers = of_chain(method, options)
    if numbers is None or len(numbers.curve) != N + 1:
        steps = torch.arange(N + 1)
        return Numbers("", "place in the chain", steps, {"step": steps})
    return numbers


def of_chain(method, options):
    """Numbers of the ancestral sampler, or of DDIM where there is an eta."""
    times = torch.tensor([0, *method.kept_steps(options.get("steps"))]).flip(0)  # (K + 1,)
    t = times[:-1]
    s = times[1:]
    alpha_bar = method.alpha_bar[times]
    level = "alpha_bar_t, the image's share of the variance of x_t"
    columns = {"t": times, "s, where the step leads": s, "alpha_bar_t": alpha_bar}
    columns["sigma = sqrt((1 - alpha_bar_t) / alpha_bar_t)"] = (1 / alpha_bar - 1).sqrt()
    one = torch.ones_like(alpha_bar[1:])
    of_x_0, variance = method.q_posterior(one, 0 * one, t, s)           # DDPM Eq. 7
    of_x_t, _ = method.q_posterior(0 * one, one, t, s)                  # DDPM Eq. 7
    eta = options.get("eta")
    if eta is None:
        columns["alpha_t = alpha_bar_t / alpha_bar_s"] = alpha_bar[:-1] / alpha_bar[1:]
        columns["a = sqrt(alpha_bar_s) (1 - alpha_t) / (1 - alpha_bar_t)"] = of_x_0
        columns["b = sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t)"] = of_x_t
        formula = "mean of x_s = a x_hat_0 + b x_t (DDPM Eq. 7)"
        return Numbers(formula, level, alpha_bar, columns)
    variance = eta**2 * variance                                        # DDIM Eq. 16
    columns["a = sqrt(alpha_bar_s)"] = alpha_bar[1:].sqrt()             # DDIM Eq. 12
    direction = (1 - alpha_bar[1:] - variance).clamp(min=0).sqrt()      # DDIM Eq. 12
    columns["b = sqrt(1 - alpha_bar_s - c^2)"] = direction
    columns["c = eta times the posterior's deviation"] = variance.sqrt()
    formula = "x_s = a x_hat_0 + b eps + c z (DDIM Eq. 12)"
    return Numbers(formula, level, alpha_bar, columns)


def of_solver(D, options):
    """Numbers of Euler's and Heun's steps; where they are not Algorithm 2's, of the levels."""
    column = options.get("discretization", "edm")
    low, high = noise_range(column, options["sigma_min"], options["sigma_max"], D)
    levels = rounded(D, sigma_steps(options["steps"], column, low, high, options["rho"]))
    churned = (options.get("S_tmin", 0) <= levels) & (levels <= options.get("S_tmax", math.inf))
    churn = min(options.get("S_churn", 0) / len(levels), math.sqrt(2) - 1)
    gamma = churn * churned.to(levels)                                  # Algorithm 2, gamma_i
    sigma_hat = rounded(D, (1 + gamma) * levels)                        # Algorithm 2, line 5
    sigma = torch.cat([levels, levels.new_zeros(1)])                    # (N + 1,)
    columns = {"i": torch.arange(len(sigma)), "sigma_i": sigma}
    columns |= {"sigma_hat_i, with churn": sigma_hat, "sigma_i+1": sigma[1:]}
    level = f"sigma_i on a logarithmic axis, from {sigma[0]:.3g} to {levels[-1]:.3g}"
    curve = sigma.clamp(min=levels[-1]).log()
    if any(options.get(name, value) != value for name, value in ALGORITHM_2.items()):
        return Numbers("", level, curve, columns)
    r = sigma[1:] / sigma_hat
    columns |= {"r = sigma_i+1 / sigma_hat_i": r, "1 - r": 1 - r}
    euler = "r x_hat_i + (1 - r) D(x_hat_i; sigma_hat_i) (EDM Algorithm 2, line 8)"
    if options.get("solver", "heun") == "euler":
        return Numbers(f"x_i+1 = {euler}", level, curve, columns)
    r = r[:-1]  # the last step is Euler's
    columns["a = (1 - r) (1 - 1/(2r))"] = (1 - r) * (1 - 1 / (2 * r))
    columns["b = (1 - r) / (2r)"] = (1 - r) / (2 * r)
    heun = "r x_hat_i + a D(x_hat_i; sigma_hat_i) + b D(x'; sigma_i+1) (line 11)"
    return Numbers(f"x' = {euler}\nx_i+1 = {heun}", level, curve, columns)


def as_html(formula):
    """A formula's ASCII as in the code, with its letters and subscripts."""
    for name, letter in LETTERS.items():
        formula = formula.replace(name, letter)
    return re.sub(r"_(i\+1|\w)", r"<sub>\1</sub>", formula)
