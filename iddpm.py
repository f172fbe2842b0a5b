"""Improved Denoising Diffusion Probabilistic Models.  Nichol & Dhariwal, 2021.  arXiv:2102.09672

DDPM plus three things: a cosine noise schedule, a learned reverse variance, and a loss that trains it. With these a chain
of 4000 steps can be sampled in 100. Notation as in ddpm.py, and

    paper           code                shape           meaning
    v               v                   (B, C, H, W)    network's second half: where log Sigma lies between its bounds
    Sigma_theta     exp(log_variance)   (B, C, H, W)    learned variance of p_theta(x_{t-1} | x_t)
    L_t             vlb_term            (B,)            term t of the bound, bits/dim
    lambda          lambda_vlb                          weight of L_vlb in L_hybrid
    p_t             probabilities()     (T,)            how often L_vlb's importance sampling draws t

Where we follow the authors' code rather than the page: v = -1 means beta_tilde and v = 1 beta (the page says 0 and 1);
L_vlb in bits/dim. Where we differ from both: the network is told t itself, not t 1000/T.
"""
import re
from itertools import accumulate
from typing import Literal

import torch
from torch import nn

from ddpm import DDPM, linear_betas


def cosine_betas(T, s=0.008):
    """(T,) float64 betas of alpha_bar_t = f(t)/f(0), none above 0.999; Eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * torch.pi / 2) ** 2                                            # Eq. 17
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)                                                        # Sec. 3.2


class IDDPM(DDPM):
    """DDPM with a cosine schedule and a variance learned through the variational bound."""
    def __init__(self, make_net, channels, *,
                 T: int = 1000,                                 # number of diffusion steps; 4000 in Sec. 3
                 schedule: Literal["cosine", "linear"] = "cosine",  # noise schedule (Eq. 17; DDPM Sec. 4)
                 objective: Literal["simple", "hybrid", "vlb"] = "hybrid",  # simple: fixed variance; hybrid: Eq. 16; vlb: Eq. 18
                 importance: bool = True,                       # draw L_vlb's t by the size of its terms (Eq. 18), not evenly
                 lambda_vlb: float = 0.001,                     # lambda, weight of L_vlb in L_hybrid (Eq. 16)
                 variance: Literal["large", "small"] = "large",  # sigma_t^2 where none is learned: beta_t or beta_tilde_t
                 clip: bool = True):                            # clip x_0_hat to [-1, 1] in sampling
        nn.Module.__init__(self)                                 # not DDPM's, which would build its schedule
        self.objective, self.learned, self.lambda_vlb = objective, objective != "simple", lambda_vlb
        self.net, self.variance, self.clip = make_net(channels, 2 * channels if self.learned else channels), variance, clip
        self.set_schedule(cosine_betas(T) if schedule == "cosine" else linear_betas(T))
        self.sampler = LossAwareSampler(T) if objective == "vlb" and importance else None

    def outputs(self, x_t, t, y=None):
        """The network's two halves: eps (B, C, H, W), and v likewise, or None where the variance is fixed."""
        out = self.eps_theta(x_t, t, y)
        return out.chunk(2, dim=1) if self.learned else (out, None)

    def x_0_and_v(self, x_t, t, y=None):
        eps, v = self.outputs(x_t, t, y)
        return self.x_0_hat(x_t, t, eps), v

    def predict(self, x_t, t, y=None):
        return self.x_0_and_v(x_t, t, y)[0]

    def p_mean_variance(self, x_t, t, s, y=None, first=(1, 2)):
        """Mean and log-variance of p_theta(x_s | x_t), and the x_0_hat they come from; DDPM Eq. 1, Eq. 15."""
        x_0_hat, v = self.x_0_and_v(x_t, t, y)
        x_0_hat = x_0_hat.clamp(-1, 1) if self.clip else x_0_hat
        return self.q_posterior(x_0_hat, x_t, t, s)[0], self.log_variance(t, s, first, v), x_0_hat

    def log_variance(self, t, s, first, v=None):
        """v between log beta_tilde (v = -1) and log beta (v = 1); without v, the fixed variance."""
        if v is None:
            return super().log_variance(t, s, first)
        fraction = (v + 1) / 2
        return fraction * self.beta(t, s).log() + (1 - fraction) * self.log_beta_tilde(t, s, first)     # Eq. 15

    def loss(self, x_0, y=None):
        """L_simple, L_hybrid or L_vlb of images in [-1, 1], by `objective`; Sec. 3."""
        t, weight = self.draw_t(len(x_0), x_0.device)
        eps = torch.randn_like(x_0)
        x_t = self.q_sample(x_0, t, eps)
        eps_hat, v = self.outputs(x_t, t, y)
        L_simple = (eps - eps_hat).square().flatten(1).mean(1)                                          # DDPM Eq. 14
        if self.objective == "simple":
            return L_simple.mean()
        if self.objective == "hybrid":
            L_t = self.L_t(x_0, x_t, t, self.x_0_hat(x_t, t, eps_hat).detach(), v)                      # Sec. 3.1
            return (L_simple + self.lambda_vlb * self.T * L_t).mean()                                   # Eq. 16
        L_t = self.L_t(x_0, x_t, t, self.x_0_hat(x_t, t, eps_hat), v)
        if self.sampler is not None:
            self.sampler.update(t, L_t.detach())
        return (weight * self.T * L_t).mean()                                                           # Eq. 18

    def L_t(self, x_0, x_t, t, x_0_hat, v):
        """Term t of the bound, (B,), bits/dim, so that L_vlb is T times its mean over t; Eqs. 4 to 6."""
        mean, _ = self.q_posterior(x_0_hat, x_t, t)
        return self.vlb_term(x_0, x_t, t, t - 1, mean, self.log_variance(t, t - 1, (1, 2), v)).to(x_0.dtype)

    def draw_t(self, B, device):
        """t (B, 1, 1, 1) and its importance weight 1/(T p_t) (B,); uniform without a sampler."""
        if self.sampler is None:
            return torch.randint(1, self.T + 1, (B, 1, 1, 1), device=device), 1.0
        p = self.sampler.probabilities()
        i = torch.multinomial(p, B, replacement=True)
        return i.view(B, 1, 1, 1) + 1, (1 / (self.T * p[i])).float()                                    # Eq. 18

    def sample(self, noise, y=None, *,
               steps: str | None = None,     # kept steps: a number, "10,15,20" for sections, "ddim50" a stride, "nll50"; default all
               eta: float | None = None,     # DDIM with this eta (0 = deterministic); default ancestral, DDPM Algorithm 2
               randn_like=torch.randn_like):
        """DDPM's sampler on the steps that `space_timesteps` keeps; the network still sees the original t; Sec. 4."""
        return super().sample(noise, y, steps=steps, eta=eta, randn_like=randn_like)                    # Eq. 19

    def kept_steps(self, steps):
        return steps if isinstance(steps, list) else space_timesteps(self.T, self.T if steps is None else steps)


class LossAwareSampler(nn.Module):
    """Draws t with p_t proportional to sqrt(E[L_t^2]), estimated from the last `history` values of each; Eq. 18."""
    def __init__(self, T, history=10, uniform=0.001):
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(T, history))             # losses[t - 1], each row a ring
        self.register_buffer("count", torch.zeros(T, dtype=torch.long))

    def probabilities(self):
        """(T,) probabilities of t = 1..T; all alike until each t has a full history."""
        p = self.losses.square().mean(1).sqrt()                                                # Eq. 18
        p = (1 - self.uniform) * p / p.sum() + self.uniform / len(p)        # in the code only: never quite 0
        return torch.where((self.count >= self.losses.shape[1]).all(), p, torch.ones_like(p) / len(p))  # Sec. 3.3

    def update(self, t, loss):
        """Record the unweighted losses (B,) seen at steps t in 1..T, (B,) or (B, 1, 1, 1)."""
        i, history = t.flatten() - 1, self.losses.shape[1]
        before = (i[:, None] == i).tril(-1).sum(1)                          # how often this t came earlier in the batch
        self.losses[i, (self.count[i] + before) % history] = loss.float()
        self.count.index_add_(0, i, torch.ones_like(i))


def space_timesteps(T, spec):
    """The kept t, increasing, within 1..T; Sec. 4.

    An int or "50" keeps that many, evenly spaced, both ends included (one: t = 1). "10,15,20" cuts 1..T into three equal sections and keeps so
    many of each. "ddim50": 50 at an integer stride from t = 1. "nll50": "50" and every t up to T // 50, for likelihoods (App. E). ValueError for what cannot be kept.
    """
    if not re.fullmatch(r"(ddim|nll)?\d+|\d+(,\d+)*", str(spec)):
        raise ValueError(f'steps must read like 50, "10,15,20", "ddim50" or "nll50", got {spec!r}')
    if str(spec).startswith("nll"):
        return sorted({*space_timesteps(T, spec[3:]), *range(1, T // int(spec[3:]) + 1)})              # App. E
    if str(spec).startswith("ddim"):
        for stride in range(1, T):
            if len(range(0, T, stride)) == int(spec[4:]):
                return list(range(1, T + 1, stride))
        raise ValueError(f"no integer stride keeps exactly {spec[4:]} of {T} steps")
    counts, kept, start = [int(part) for part in str(spec).split(",")], [], 0
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot keep {count} of a section of {size} steps")
        strides = [(size - 1) / (count - 1)] * (count - 1) if count > 1 else []
        kept += [start + round(position) + 1 for position in accumulate([0.0, *strides])]               # a running sum, as the authors round it
        start += size
    return kept
