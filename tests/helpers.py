"""What the tests share: tables of numbers, data and networks known in closed form."""
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from explain import equal, holds

HERE = Path(__file__).parent


def golden(name):
    """Numbers printed by the authors' code; "meta" in the file says which."""
    return json.loads((HERE / "golden" / f"{name}.json").read_text(encoding="utf-8"))


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def images(*numbers, dtype=torch.float64):
    """Images of one pixel, (B, 1, 1, 1)."""
    return torch.tensor(numbers, dtype=dtype).view(-1, 1, 1, 1)


# Networks

def closed_form(fn):
    """A make_net whose network is fn(x, t, y), with t (B, 1, 1, 1)."""

    class Net(torch.nn.Module):
        def forward(self, x, c_noise, y=None):
            assert c_noise.shape == (len(x),), "c_noise is (B,)"
            assert c_noise.dtype == torch.float32, "c_noise is float32"
            return fn(x, c_noise.view(-1, 1, 1, 1), y)

    return lambda in_channels, out_channels: Net()


class Call(NamedTuple):
    x: torch.Tensor
    t: torch.Tensor  # (B, 1, 1, 1)
    y: torch.Tensor | None


def watched(fn=lambda x, t, y: x):
    """(make_net as of closed_form, the list of Calls that its network has got so far)."""
    calls = []

    def watch(x, t, y):
        calls.append(Call(x, t, y))
        return fn(x, t, y)

    return closed_form(watch), calls


def halves(eps, v):
    """A make_net with the two halves that IDDPM asks for: eps(x, t) and v(x, t)."""
    return closed_form(lambda x, t, y: torch.cat([eps(x, t), v(x, t)], dim=1))


def asks_and_teaches(make_model, channels=1):
    """make_model(make_net)'s loss gives the network the classes, and the network a gradient.

    channels: of the network's answer to gray images.
    """
    weight = torch.ones(1, requires_grad=True)
    net, calls = watched(lambda x, t, y: weight * x.expand(-1, channels, -1, -1))
    y = torch.tensor([3, 1])
    loss = make_model(net).loss(torch.zeros(2, 1, 4, 4), y)
    equal(calls[0].y, y, what="the classes that the network is told")
    holds(loss.requires_grad, "the loss has a gradient for the network's weights")


zero_net = closed_form(lambda x, t, y: torch.zeros_like(x))
same_net = closed_form(lambda x, t, y: x)


# Data

class Gaussian:
    """Images of independent pixels N(mu, s^2): every posterior is known in closed form."""

    def __init__(self, mu=0.3, s=0.4):
        self.mu = mu
        self.s = s

    def draw(self, n):
        return self.mu + self.s * torch.randn(n, 1, 1, 1, dtype=torch.float64)

    def x_0(self, x_t, alpha_bar):
        """E[x_0 | x_t]."""
        gain = alpha_bar.sqrt() * self.s**2 / (alpha_bar * self.s**2 + 1 - alpha_bar)
        return self.mu + gain * (x_t - alpha_bar.sqrt() * self.mu)

    def eps(self, x_t, alpha_bar):
        """E[eps | x_t]."""
        return (x_t - alpha_bar.sqrt() * self.x_0(x_t, alpha_bar)) / (1 - alpha_bar).sqrt()

    def left(self, alpha_bar):
        """Var(x_0 | x_t)."""
        return self.s**2 * (1 - alpha_bar) / (alpha_bar * self.s**2 + 1 - alpha_bar)

    def D(self, x, sigma, y=None):
        """E[x_0 | x_0 + sigma n]."""
        return (self.s**2 * x + sigma**2 * self.mu) / (self.s**2 + sigma**2)

    def along_the_ode(self, noise, high, low=0.0):
        """Where the ODE carries high * noise, from noise level high down to low."""
        shrink = ((self.s**2 + low**2) / (self.s**2 + high**2)) ** 0.5
        return self.mu + (high * noise - self.mu) * shrink


# Schedules, written again from the papers

def linear_alpha_bar(T=1000):
    """(T + 1,), DDPM Sec. 4."""
    betas = [(1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T for i in range(T)]
    return torch.cat([tensor([1.0]), (1 - tensor(betas)).cumprod(0)])


def cosine_alpha_bar(T=1000):
    """(T + 1,), IDDPM Eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2) ** 2
    alphas = (f[1:] / f[:-1]).clamp(min=0.001)
    return torch.cat([tensor([1.0]), alphas.cumprod(0)])


def level(alpha_bar):
    """EDM's noise level of DDPM's alpha_bar."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def tanh_cdf(z):
    """The authors' standard normal cdf."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


# Samplers

def last(chain):
    """The x of the last step of a sampler."""
    return states(chain)[-1]


def states(chain):
    """The x of every step."""
    return [x for x, _ in chain]


def tape(draws):
    """A randn_like that plays these draws one after another."""
    rest = iter(draws)
    return lambda x: next(rest)
