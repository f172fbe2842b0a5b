"""Improved Denoising Diffusion Probabilistic Models.  Nichol & Dhariwal, 2021.
arXiv:2102.09672

DDPM plus three things: a cosine noise schedule, a learned reverse variance, and a loss that
trains it. With these a chain of 4000 steps can be sampled in 100. Notation as in ddpm.py, and

    paper         code               shape          meaning
    v             v                  (B, C, H, W)   where log Sigma lies between its two bounds
    Sigma_theta   exp(log_variance)  (B, C, H, W)   learned variance of p_theta(x_{t-1} | x_t)
    L_{t-1}       L_t                (B,)           the bound's term at step t, bits/dim
    lambda        lambda_vlb                        weight of L_vlb in L_hybrid
    p_t           probabilities()    (T,)           how often importance sampling draws t
    S_t           tau                (K + 1,)       the kept steps of a shorter chain

Where we follow the authors' code rather than the page: v = -1 means beta_tilde and v = 1 beta
(the page says 0 and 1); L_vlb is in bits/dim; sections, "ddim50" and the rounding of
`space_timesteps`.
Where we differ from their code: the network is told t itself, not (t - 1) 1000/T.
"""
import re
from typing import Literal

import torch
from torch import nn

from ddpm import DDPM, linear_betas


def cosine_betas(T, s=0.008):
    """(T,) float64 betas of alpha_bar_t = f(t)/f(0), none above 0.999; Eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * torch.pi / 2) ** 2            # Eq. 17
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)                        # Eq. 17; Sec. 3.2


class IDDPM(DDPM):
    """DDPM with a cosine schedule and a variance learned through the variational bound."""

    latent_config = {"clip": False, "objective": "simple"}  # the bound counts bits of pixels

    def __init__(
        self,
        make_net,
        channels,
        *,
        T: int = 1000,  # number of diffusion steps; 4000 in Sec. 3
        schedule: Literal["cosine", "linear"] = "cosine",  # of the noise (Eq. 17; DDPM Sec. 4)
        objective: Literal["simple", "hybrid", "vlb"] = "hybrid",  # what to minimise (Sec. 3)
        importance: bool = True,  # draw L_vlb's t by the size of its terms (Eq. 18)
        lambda_vlb: float = 0.001,  # lambda, weight of L_vlb in L_hybrid (Eq. 16)
        variance: Literal["large", "small"] = "large",  # if not learned: beta_t or beta_tilde_t
        clip: bool = True,  # clip x_0_hat to [-1, 1] in sampling
        betas=None,
    ):
        learned = objective != "simple"
        halves = 2 if learned else 1

        def make_wide(c_in, c_out):
            return make_net(c_in, halves * c_out)                       # Sec. 3.1

        if betas is None:
            betas = cosine_betas(T) if schedule == "cosine" else linear_betas(T)
        super().__init__(make_wide, channels, T=T, variance=variance, clip=clip, betas=betas)
        self.objective = objective
        self.learned = learned
        self.lambda_vlb = lambda_vlb
        by_importance = objective == "vlb" and importance
        self.sampler = LossAwareSampler(T) if by_importance else None

    # Learned variance

    def outputs(self, x_t, t, y=None):
        """The network's two halves, (B, C, H, W) each: eps, and v or None where it is fixed."""
        out = self.eps_theta(x_t, t, y)                                 # (B, C or 2C, H, W)
        return out.chunk(2, dim=1) if self.learned else (out, None)

    def x_0_and_v(self, x_t, t, y=None):
        eps, v = self.outputs(x_t, t, y)
        return self.x_0_hat(x_t, t, eps), v

    def predict(self, x_t, t, y=None):
        x_0_hat, _ = self.x_0_and_v(x_t, t, y)
        return x_0_hat

    def p_mean_variance(self, x_t, t, s, y=None, chain=None):
        """Mean and log-variance of p_theta(x_s | x_t), and x_0_hat, on the steps of a chain."""
        if chain is None:
            chain = self
        x_0_hat, v = self.x_0_and_v(x_t, chain.tau[t], y)
        x_0_hat = self.clip_if_asked(x_0_hat)
        mean, _ = chain.q_posterior(x_0_hat, x_t, t, s)                 # DDPM Eq. 11
        return mean, self.log_variance(t, s, chain, v), x_0_hat

    def log_variance(self, t, s, chain, v=None):
        """v between log beta_tilde (v = -1) and log beta (v = 1); without v, the fixed one."""
        if v is None:
            return super().log_variance(t, s, chain)
        log_beta = chain.beta(t, s).log()
        log_beta_tilde = chain.log_beta_tilde(t, s)
        fraction = (v + 1) / 2  # the page's v
        return fraction * log_beta + (1 - fraction) * log_beta_tilde    # Eq. 15

    # Training

    def loss(self, x_0, y=None):
        """L_simple, L_hybrid or L_vlb of images in [-1, 1], by `objective`; Sec. 3."""
        t = self.draw_t(x_0)
        eps = torch.randn_like(x_0)
        x_t = self.q_sample(x_0, t, eps)
        eps_hat, v = self.outputs(x_t, t, y)
        L_simple = (eps - eps_hat).square().flatten(1).mean(1)          # DDPM Eq. 14
        if self.objective == "simple":
            return L_simple.mean()
        x_0_hat = self.x_0_hat(x_t, t, eps_hat)
        if self.objective == "hybrid":
            L_t = self.L_t(x_0, x_t, t, x_0_hat.detach(), v)            # Sec. 3.1
            return (L_simple + self.lambda_vlb * self.T * L_t).mean()   # Eq. 16
        L_t = self.L_t(x_0, x_t, t, x_0_hat, v)
        if self.sampler is None:
            return (self.T * L_t).mean()                                # Eq. 4
        weight = self.sampler.weights(t)
        self.sampler.update(t, L_t.detach())
        return (weight * self.T * L_t).mean()                           # Eq. 18

    def L_t(self, x_0, x_t, t, x_0_hat, v):
        """The bound's term at t, (B,), bits/dim: L_vlb is T times its mean over t; Eq. 4."""
        mean, _ = self.q_posterior(x_0_hat, x_t, t)
        log_variance = self.log_variance(t, t - 1, self, v)
        term = self.vlb_term(x_0, x_t, t, t - 1, mean, log_variance)    # Eq. 5, Eq. 6
        return term.to(x_0.dtype)

    def draw_t(self, x_0):
        """A step of 1..T for each image, (B, 1, 1, 1), uniform without a sampler."""
        if self.sampler is None:
            return super().draw_t(x_0)
        p = self.sampler.probabilities()
        return 1 + p.multinomial(len(x_0), replacement=True).view(-1, 1, 1, 1)  # Eq. 18

    # Sampling

    def sample(
        self,
        noise,
        y=None,
        *,
        steps: str | None = None,  # "50", "10,15,20", "ddim50", "nll50", "quad50"; default all
        eta: float | None = None,  # DDIM's eta, 0 deterministic; default ancestral
        randn_like=torch.randn_like,
    ):
        """DDPM's sampler on the steps of `space_timesteps`; the network is told the original t.

        Repeated for what `steps` may be here: a chain's tables are Eq. 19 by themselves.
        """
        return super().sample(noise, y, steps=steps, eta=eta, randn_like=randn_like)  # Eq. 19

    def kept_steps(self, steps):
        if isinstance(steps, list) or str(steps).startswith("quad"):
            return super().kept_steps(steps)
        return space_timesteps(self.T, self.T if steps is None else steps)


class LossAwareSampler(nn.Module):
    """Draws t with p_t proportional to sqrt(E[L_t^2]), from the last values of each; Eq. 18."""

    def __init__(self, T, history=10, uniform=0.001):
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(T, history))         # row t - 1, each a ring
        self.register_buffer("count", torch.zeros(T, dtype=torch.long))

    def probabilities(self):
        """(T,) probabilities of t = 1..T; uniform until each t has a full history."""
        p = self.losses.square().mean(1).sqrt()                         # Eq. 18
        p = (1 - self.uniform) * p / p.sum()
        p = p + self.uniform / len(p)  # in the authors' code only
        full = (self.count >= self.losses.shape[1]).all()               # Sec. 3.3
        return torch.where(full, p, torch.ones_like(p) / len(p))

    def weights(self, t):
        """1 / (T p_t) of the steps t, (B,): what makes the mean over drawn t that over all."""
        p = self.probabilities()
        return 1 / (len(p) * p[t.flatten() - 1])                        # Eq. 18

    def update(self, t, loss):
        """Record the unweighted losses (B,) seen at steps t, (B,) or (B, 1, 1, 1).

        Where several processes train together, each records what all have seen.
        """
        i = of_all_processes(t.flatten() - 1)
        loss = of_all_processes(loss)
        history = self.losses.shape[1]
        same_t = i[:, None] == i                                        # (B, B)
        before = same_t.tril(-1).sum(1)  # how often this t came earlier in the batch
        place = (self.count[i] + before) % history
        # Of several for one place the last: a GPU writes them in no order
        rivals = same_t & (place[:, None] == place)
        order = torch.arange(len(i), device=i.device)
        last = (rivals * order).amax(1)
        self.losses[i, place] = loss[last].float()
        self.count.index_add_(0, i, torch.ones_like(i))


def of_all_processes(x):
    """x (B,) of every process that trains together, one after another."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts)


def space_timesteps(T, spec):
    """The kept t, increasing, within 1..T; Sec. 4.

    An int or "50" keeps that many, evenly spaced, both ends included (one: t = 1, where DDPM's
    is T). "10,15,20" cuts 1..T into three equal sections and keeps so many of each. "ddim50" is
    50 at an integer stride from t = 1; "nll50" is "50" and every t up to T // 50, for
    likelihoods. ValueError for what cannot be kept.
    """
    spec = str(spec)
    if not re.fullmatch(r"(ddim|nll)?\d+|\d+(,\d+)*", spec):
        raise ValueError(f'steps read like 50, "10,15,20", "ddim50" or "nll50", got {spec!r}')
    if spec.startswith("nll"):
        kept = space_timesteps(T, spec[3:])
        early = range(1, T // int(spec[3:]) + 1)
        return sorted({*kept, *early})                                  # App. E
    if spec.startswith("ddim"):
        return at_an_integer_stride(T, int(spec[4:]))
    counts = [int(part) for part in spec.split(",")]
    kept = []
    start = 1
    for k, count in enumerate(counts):
        size = T // len(counts)
        if k < T % len(counts):
            size += 1
        kept += [start + offset for offset in evenly_spaced(size, count)]
        start += size
    return kept


def at_an_integer_stride(T, count):
    for stride in range(1, T):
        kept = list(range(1, T + 1, stride))
        if len(kept) == count:
            return kept
    raise ValueError(f"no integer stride keeps exactly {count} of {T} steps")


def evenly_spaced(size, count):
    """`count` of 0, ..., size - 1, both ends kept: a running sum, rounded as the authors do."""
    if not 1 <= count <= size:
        raise ValueError(f"cannot keep {count} of a section of {size} steps")
    if count == 1:
        return [0]
    stride = (size - 1) / (count - 1)
    position = 0.0
    kept = []
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return kept
