"""Denoising Diffusion Probabilistic Models.  Ho, Jain & Abbeel, 2020.  arXiv:2006.11239
With the sampler of Denoising Diffusion Implicit Models.  Song, Meng & Ermon, 2020.  arXiv:2010.02502

Noise an image in T small Gaussian steps; train a network to tell the noise in it; sample by undoing the steps one by one.

    paper           code              shape          meaning
    x_0, x_t        x_0, x_t          (B, C, H, W)   clean and noisy images, pixels in [-1, 1]
    t = 1, ..., T   t                 (B, 1, 1, 1)   time step (a plain number is taken too); t = 0 is clean data
    t-1             s                 (B, 1, 1, 1)   the step to go to; any s < t, so that chains can be shortened
    beta_t          1 - alpha                        variance added between s and t
    alpha_t         alpha             (B, 1, 1, 1)   alpha_bar_t / alpha_bar_s, which is 1 - beta_t where s = t-1
    alpha_bar_t     alpha_bar[t]      (T + 1,)       alpha_1 ... alpha_t; alpha_bar[0] = 1; DDIM calls it alpha_t
    eps_theta       self.eps_theta    (B, C, H, W)   predicted noise
    mu_tilde_t, ..  q_posterior       (B, C, H, W)   mean of q(x_{t-1} | x_t, x_0), and its variance beta_tilde_t
    sigma_t^2       exp(log_variance)                variance of the reverse step; DDIM's sigma is `sigma`
    tau             steps                            DDIM's kept steps

Where we follow the authors' code rather than the page: sampling goes through x_0_hat (Eq. 15), clipped to [-1, 1], and
the posterior mean (Eq. 7), which without the clipping is Eq. 11; the log-variance at t = 1 is beta_tilde's at t = 2.
Where we differ from both: linear betas scale with 1000/T, so that T is free.
"""
import math
from typing import Literal

import torch
from torch import nn


def linear_betas(T, beta_1=1e-4, beta_T=0.02):
    """(T,) float64: from beta_1 to beta_T (Sec. 4), both times 1000/T so that every T ends at the same alpha_bar_T."""
    return torch.linspace(beta_1 * 1000 / T, beta_T * 1000 / T, T, dtype=torch.float64)


class DDPM(nn.Module):
    """Train by predicting the noise (Algorithm 1); sample by removing it (Algorithm 2)."""
    def __init__(self, make_net, channels, *,
                 T: int = 1000,                               # number of diffusion steps (Sec. 4)
                 variance: Literal["large", "small"] = "large",  # sigma_t^2: beta_t or beta_tilde_t (Sec. 3.2)
                 clip: bool = True,                           # clip x_0_hat to [-1, 1] in sampling
                 beta_1: float = 1e-4,                        # variance of the first step at T = 1000 (Sec. 4)
                 beta_T: float = 0.02):                       # variance of the last step at T = 1000 (Sec. 4)
        super().__init__()
        self.net, self.variance, self.clip = make_net(channels, channels), variance, clip
        self.set_schedule(linear_betas(T, beta_1, beta_T))

    def set_schedule(self, betas):                                                          # (T,), t = 1..T
        self.T = len(betas)
        if self.T < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"T = {self.T} steps put a beta outside (0, 1); choose a larger T")
        alpha_bar = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)                      # float64: cast the results, not this

    # Forward process
    def q_sample(self, x_0, t, eps):
        """x_t ~ q(x_t | x_0), for eps ~ N(0, I); Eq. 4."""
        alpha_bar = self.alpha_bar[t]
        return (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps).to(x_0.dtype)                    # Eq. 4

    def q_posterior(self, x_0, x_t, t, s=None):
        """Mean and variance (beta_tilde) of q(x_s | x_t, x_0), s < t, by default s = t-1; Eqs. 6 and 7."""
        s = t - 1 if s is None else s
        alpha_bar, alpha_bar_s = self.alpha_bar[t], self.alpha_bar[s]
        alpha = alpha_bar / alpha_bar_s
        mean = (alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar) * x_0
                + alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar) * x_t)                             # Eq. 7
        return mean.to(x_t.dtype), self.beta_tilde(t, s)

    def beta_tilde(self, t, s):
        return (1 - self.alpha_bar[s]) / (1 - self.alpha_bar[t]) * self.beta(t, s)                      # Eq. 7

    def beta(self, t, s):
        return 1 - self.alpha_bar[t] / self.alpha_bar[s]                                                # Eq. 2

    # Training
    def loss(self, x_0, y=None):
        """L_simple of images in [-1, 1], which is Eq. 12 without its weight beta^2 / (2 sigma^2 alpha (1 - alpha_bar))."""
        t = torch.randint(1, self.T + 1, (len(x_0), 1, 1, 1), device=x_0.device)                        # Algorithm 1, line 3
        eps = torch.randn_like(x_0)                                                                     # Algorithm 1, line 4
        return (eps - self.eps_theta(self.q_sample(x_0, t, eps), t, y)).square().mean()                 # Eq. 14

    def eps_theta(self, x_t, t, y=None):
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device)
        return self.net(x_t, t.expand(len(x_t), 1, 1, 1).flatten(), y)

    # Reverse process
    def x_0_hat(self, x_t, t, eps):
        """The x_0 of which x_t is the noisy version if its noise is eps; Eq. 15."""
        alpha_bar = self.alpha_bar[t]
        return ((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()).to(x_t.dtype)                  # Eq. 15

    def predict(self, x_t, t, y=None):
        """x_0_hat (B, C, H, W), not clipped."""
        return self.x_0_hat(x_t, t, self.eps_theta(x_t, t, y))

    def p_mean_variance(self, x_t, t, s, y=None, first=(1, 2)):
        """Mean and log-variance of p_theta(x_s | x_t), and the x_0_hat they come from; Eq. 1. first: see log_beta_tilde."""
        x_0_hat = self.predict(x_t, t, y)
        x_0_hat = x_0_hat.clamp(-1, 1) if self.clip else x_0_hat
        mean, _ = self.q_posterior(x_0_hat, x_t, t, s)                                                  # Eq. 11, if not clipped
        return mean, self.log_variance(t, s, first), x_0_hat

    def log_variance(self, t, s, first):
        """log sigma_t^2 of the reverse step, float64; Sec. 3.2."""
        is_large = (torch.as_tensor(s, device=self.alpha_bar.device) > 0) & (self.variance == "large")  # Sec. 3.2
        return torch.where(is_large, self.beta(t, s).log(), self.log_beta_tilde(t, s, first))

    def log_beta_tilde(self, t, s, first=(1, 2)):
        """Log of the posterior variance, which is 0 at s = 0: there it is that of the step between the chain's first two t."""
        t, s = (torch.as_tensor(k, device=self.alpha_bar.device) for k in (t, s))
        return self.beta_tilde(torch.where(s > 0, t, first[1]), torch.where(s > 0, s, first[0])).log()

    @torch.no_grad()
    def sample(self, noise, y=None, *,
               steps: int | None = None,     # number of steps, evenly spaced over 1..T; default all
               eta: float | None = None,     # DDIM with this eta (0 = deterministic); default ancestral, Algorithm 2
               randn_like=torch.randn_like):
        """From noise x_T (B, C, H, W) to images, yielding (x, x_0_hat) after each step. steps may also list the kept t; eta lies in [0, 1]."""
        if not 0 <= (eta or 0) <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {eta}")
        x = noise                                                                                       # Algorithm 2, line 1
        tau = self.kept_steps(steps)
        for s, t in reversed(list(zip([0] + tau, tau))):                                                # Algorithm 2, line 2
            mean, log_variance, x_0_hat = self.p_mean_variance(x, t, s, y)
            z = randn_like(x)                                                                           # Algorithm 2, line 3
            if eta is None:
                x = mean + (0.5 * log_variance).exp().to(x.dtype) * z if s > 0 else mean                # Algorithm 2, line 4
            else:
                alpha_bar, alpha_bar_s = self.alpha_bar[t], self.alpha_bar[s]
                eps = (x - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()                         # again, from the clipped x_0_hat
                sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar) * self.beta(t, s)).sqrt()            # DDIM Eq. 16
                x = alpha_bar_s.sqrt() * x_0_hat + (1 - alpha_bar_s - sigma ** 2).sqrt() * eps + sigma * z  # DDIM Eq. 12
            yield x, x_0_hat

    def kept_steps(self, steps):
        """The t of a chain, [tau_1, ...] increasing from 1 to T: all, `steps` of them evenly spaced (one alone is T), or the given list."""
        if isinstance(steps, list):
            return steps
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must lie in 1..{self.T}, got {steps}")
        return torch.linspace(1 if steps > 1 else self.T, self.T, steps, dtype=torch.float64).round().long().tolist()

    # Variational bound
    @torch.no_grad()
    def bits_per_dim(self, x_0, y=None, *, steps=None, randn_like=torch.randn_like, progress=iter):
        """The bound on -log2 p(x_0) per dimension of 8-bit images in [-1, 1], one noise draw a term; Eq. 5.

        A dict of prior (B,), L_T; terms (B, steps), L_0 first; mse (B, steps) of x_0_hat; total (B,). progress wraps the loop (tqdm).
        """
        tau, terms, mse = self.kept_steps(steps), [], []
        if len(tau) < 2:
            raise ValueError("the bound needs 2 steps or more")
        for s, t in progress(list(zip([0] + tau, tau))):
            x_t = self.q_sample(x_0, t, randn_like(x_0))
            mean, log_variance, x_0_hat = self.p_mean_variance(x_t, t, s, y, first=tau[:2])
            terms.append(self.vlb_term(x_0, x_t, t, s, mean, log_variance))
            mse.append((x_0_hat - x_0).square().flatten(1).mean(1))
        alpha_bar = self.alpha_bar[tau[-1]]
        prior = normal_kl(alpha_bar.sqrt() * x_0, (1 - alpha_bar).log(), 0, 0 * alpha_bar).flatten(1).mean(1) / math.log(2)  # Eq. 5, L_T
        terms, mse = torch.stack(terms, dim=1), torch.stack(mse, dim=1)                                 # (B, steps)
        return dict(total=prior + terms.sum(1), prior=prior, terms=terms, mse=mse)                      # Eq. 5

    def vlb_term(self, x_0, x_t, t, s, mean, log_variance):
        """One term of the bound for each image, (B,), bits/dim: L_0 where s = 0, else L_{t-1}; Eq. 5."""
        x_0, mean = x_0.to(self.alpha_bar.dtype), mean.to(self.alpha_bar.dtype)                         # float32 saturates in Eq. 13
        posterior_mean, _ = self.q_posterior(x_0, x_t, t, s)
        kl = normal_kl(posterior_mean, self.log_beta_tilde(t, s), mean, log_variance)                   # Eqs. 5 and 8, L_{t-1}
        nll = -discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)                       # Eq. 5, L_0
        s = torch.as_tensor(s, device=x_0.device)
        return torch.where(s > 0, kl, nll).flatten(1).mean(1) / math.log(2)


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) in nats, elementwise."""
    return 0.5 * (log_variance_2 - log_variance_1 - 1 + (log_variance_1 - log_variance_2).exp()
                  + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def discretized_gaussian_log_likelihood(x_0, mean, log_std):
    """log p(x_0) in nats, elementwise, of pixels k/127.5 - 1 under N(mean, std^2) in bins 2/255 wide, at least log 1e-12; Eq. 13 with the authors' tanh for Phi."""
    def cdf(x):
        z = (x - mean) * (-log_std).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))                                           # Eq. 13, delta_+
    lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))                                          # Eq. 13, delta_-
    return (upper - lower).clamp(min=1e-12).log()
