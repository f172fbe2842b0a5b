"""A distribution whose denoiser is known, and EDM's SDE on it: what edm_churn.py measures.

It is a mixture of three Gaussians, every pixel alike. Its denoiser can be made to err as a
network does: it removes slightly too much noise (EDM, Sec. 4).
"""
import math
import statistics
from typing import NamedTuple

import torch

from edm import noise_range, ode_sample, sigma_of_each, sigma_steps

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
S = 0.08  # standard deviation of each
CHURNS = (0, 0.1, 0.2, math.sqrt(2) - 1)  # S_churn as a share of the steps


class Mixture:
    """D(x, sigma) of the mixture; `error`: the share of noise that it removes too much.

    Below sigma = 1 it errs by sigma times as much.
    """

    sigma_min = 0.002
    sigma_max = 80.0

    def __init__(self, error=0.0):
        self.error = error

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, y=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        variance = (S**2 + sigma**2)[..., None]
        off = x[..., None] - MEANS
        w = (WEIGHTS.log() - off.square() / (2 * variance)).softmax(-1)
        D = (w * (MEANS + S**2 / variance * off)).sum(-1)
        return D + self.error * (D - x) * sigma.clamp(max=1)


def draw(n):
    """n samples of the mixture itself."""
    k = torch.multinomial(WEIGHTS, n, replacement=True)
    return MEANS[k] + S * torch.randn(n, dtype=torch.float64)


def wasserstein(x, truth):
    """Wasserstein-1 distance between two samples of one number."""
    return (x.flatten().sort()[0] - truth.flatten().sort()[0]).abs().mean().item()


@torch.no_grad()
def euler_maruyama(D, noise, y=None, *, steps, randn_like=torch.randn_like):
    """EDM's SDE with beta(t) = 1 / t on EDM's noise levels, yielding (x, denoised).

    dx = -2 t score dt + sqrt(2 t) dw, where score = (D - x) / t^2.
    """
    levels = sigma_steps(steps, "edm", *noise_range("edm", None, None, D)).tolist()
    wide = torch.float32 if noise.device.type == "mps" else torch.float64
    x = levels[0] * noise.to(wide)
    for t, t_next in zip(levels, levels[1:] + [0.0]):
        h = t - t_next
        z = randn_like(x)
        fresh = math.sqrt(2 * t * h) if t_next > 0 else 0.0
        denoised = D(x, sigma_of_each(t, x), y)
        x = x + 2 * h * (denoised - x) / t + fresh * z                  # Eq. 6
        yield x.to(noise.dtype), denoised.to(noise.dtype)


class Distances(NamedTuple):
    """How far each sampler's samples lie from the truth."""

    error: float  # of the denoiser
    evaluations: int
    distances: dict  # {sampler: a value for each seed}

    def columns(self):
        means = {name: round(statistics.mean(d), 5) for name, d in self.distances.items()}
        return dict(error=self.error, evaluations=self.evaluations) | means


def distances_of(n, seeds):
    """Distances, for each error and number of evaluations."""
    torch.manual_seed(0)
    truth = draw(n)
    print(f"two samples of the truth: {wasserstein(draw(n), truth):.5f}")
    rows = []
    for error in (0.0, 0.05):
        for evaluations in (35, 79, 159):
            steps = (evaluations + 1) // 2
            options = dict(steps=evaluations)
            found = {"euler_maruyama": distances(euler_maruyama, error, truth, seeds, options)}
            for share in CHURNS:
                options = dict(steps=steps, S_churn=share * steps)
                name = f"algorithm_2_churn_{share:g}"
                found[name] = distances(ode_sample, error, truth, seeds, options)
            rows.append(Distances(error, evaluations, found))
    return rows


def distances(sampler, error, truth, seeds, options):
    """A sampler's distances from the truth, one for each seed."""
    found = []
    for _ in range(seeds):
        noise = torch.randn(len(truth), 1, 1, 1, dtype=torch.float64)
        for step in sampler(Mixture(error), noise, **options):
            x, _ = step
        found.append(wasserstein(x, truth))
    return found
