"""Denoising Diffusion Probabilistic Models.  Ho, Jain & Abbeel, 2020.  arXiv:2006.11239
With the sampler of Denoising Diffusion Implicit Models.  Song, Meng & Ermon, 2020.
arXiv:2010.02502

Noise an image in T small Gaussian steps; train a network to tell the noise in it; sample by
undoing the steps one by one.

    paper           code              shape          meaning
    x_0, x_t        x_0, x_t          (B, C, H, W)   clean and noisy images, pixels in [-1, 1]
    t = 1, ..., T   t                 (B, 1, 1, 1)   time step, or a number; 0 is clean data
    t-1             s                 (B, 1, 1, 1)   the step to go to; any s < t will do
    alpha_bar_t     alpha_bar[t]      (T + 1,)       alpha_1 ... alpha_t; alpha_bar[0] = 1
    alpha_t         alpha                            alpha_bar_t / alpha_bar_s
    beta_t          beta(t, s)                       1 - alpha_t, the variance added from s to t
    mu_tilde_t      q_posterior       (B, C, H, W)   mean of q(x_{t-1} | x_t, x_0)
    beta_tilde_t    beta_tilde(t, s)                 its variance
    eps_theta       eps_theta         (B, C, H, W)   predicted noise
    mu_theta        mean              (B, C, H, W)   mean of the reverse step
    sigma_t^2       exp(log_variance)                variance of the reverse step
    tau             tau[k]            (K + 1,)       DDIM's kept steps; its alpha_t: alpha_bar_t

Where we follow the authors' code rather than the page: sampling goes through x_0_hat (Eq. 15),
clipped to [-1, 1], and the posterior mean (Eq. 7), which without the clipping is Eq. 11; sigma
at t = 1, where beta_tilde is 0, is beta_tilde of t = 2, for either variance (only L_0 sees it);
losses are means over pixels, not sums.
Where we differ from the authors: linear betas scale with 1000/T, so that T is free, and the
network is told t, theirs t - 1.
"""
import math
from typing import Literal

import torch
from torch import nn


def linear_betas(T, beta_1=1e-4, beta_T=0.02):
    """(T,) float64, evenly spaced, both ends times 1000/T so that alpha_bar_T keeps; Sec. 4."""
    return torch.linspace(beta_1 * 1000 / T, beta_T * 1000 / T, T, dtype=torch.float64)


class Chain(nn.Module):
    """The forward process and its posterior (Sec. 2), on the steps tau_1 < ... < tau_K.

    A chain has tables of its own: step k leads from k to k-1, and row 0 is clean data. The
    whole chain is the case tau_k = k. Tables are float64; results have the images' type.
    """

    def __init__(self, alpha_bar, tau):
        """From the whole chain's alpha_bar (T + 1,) and the kept steps, K rising numbers."""
        super().__init__()
        tau = torch.tensor([0, *tau], device=alpha_bar.device)          # (K + 1,)
        self.register_buffer("tau", tau, persistent=False)
        self.register_buffer("alpha_bar", alpha_bar[tau], persistent=False)

    def q_sample(self, x_0, t, eps):
        """x_t ~ q(x_t | x_0), (B, C, H, W), for eps ~ N(0, I); Eq. 4."""
        alpha_bar = self.alpha_bar[t]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps     # Eq. 4
        return x_t.to(x_0.dtype)

    def q_posterior(self, x_0, x_t, t, s=None):
        """Mean and variance of q(x_s | x_t, x_0), s < t, by default t-1; Eq. 6."""
        if s is None:
            s = t - 1
        alpha_bar = self.alpha_bar[t]
        alpha_bar_s = self.alpha_bar[s]
        alpha = alpha_bar / alpha_bar_s
        of_x_0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar)     # Eq. 7
        of_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar)     # Eq. 7
        mean = of_x_0 * x_0 + of_x_t * x_t                              # Eq. 7
        return mean.to(x_t.dtype), self.beta_tilde(t, s)

    def beta_tilde(self, t, s):
        share = (1 - self.alpha_bar[s]) / (1 - self.alpha_bar[t])
        return share * self.beta(t, s)                                  # Eq. 7

    def beta(self, t, s):
        return 1 - self.alpha_bar[t] / self.alpha_bar[s]                # Eq. 2

    def log_beta_tilde(self, t, s):
        """log beta_tilde; at s = 0, where that is log 0, that of the chain's second step."""
        has_second = len(self.tau) > 2
        at_0 = self.beta_tilde(2, 1) if has_second else self.beta(1, 0)
        return torch.where(self.tau[s] > 0, self.beta_tilde(t, s), at_0).log()


class DDPM(Chain):
    """Train by predicting the noise (Algorithm 1); sample by removing it (Algorithm 2)."""

    latent_config = {"clip": False, "objective": "simple"}  # latents are no pixels

    def __init__(
        self,
        make_net,
        channels,
        *,
        T: int = 1000,  # number of diffusion steps (Sec. 4)
        objective: Literal["simple", "bound"] = "simple",  # L_simple, or L itself (Table 2)
        variance: Literal["large", "small"] = "large",  # sigma_t^2: beta_t or beta_tilde_t
        clip: bool = True,  # clip x_0_hat to [-1, 1] in sampling
        beta_1: float = 1e-4,  # variance of the first step at T = 1000 (Sec. 4)
        beta_T: float = 0.02,  # variance of the last step at T = 1000 (Sec. 4)
        betas=None,  # (T,), instead of linear ones
    ):
        if betas is None:
            if min(beta_1, beta_T) <= 0 or max(beta_1, beta_T) >= 1:
                raise ValueError(f"beta_1 {beta_1:g}, beta_T {beta_T:g}: a beta outside (0, 1)")
            betas = linear_betas(T, beta_1, beta_T)                     # (T,), t = 1..T
        if len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"T = {T} steps put a beta outside (0, 1); choose a larger T")
        alpha_bar = (1 - betas).cumprod(0)                              # Eq. 4
        super().__init__(torch.cat([betas.new_ones(1), alpha_bar]), range(1, T + 1))
        self.net = make_net(channels, channels)
        self.T = T
        self.objective = objective
        self.variance = variance
        self.clip = clip

    # Training

    def loss(self, x_0, y=None):
        """L_simple of images in [-1, 1], a mean over pixels (Eq. 12 without weight), or L."""
        t = self.draw_t(x_0)                                            # Algorithm 1, line 3
        eps = torch.randn_like(x_0)                                     # Algorithm 1, line 4
        x_t = self.q_sample(x_0, t, eps)                                # Algorithm 1, line 5
        if self.objective == "bound":
            return self.bound(x_0, x_t, t, y)
        return (eps - self.eps_theta(x_t, t, y)).square().mean()        # Eq. 14

    def bound(self, x_0, x_t, t, y=None):
        """L in bits/dim, from a random term for each image, without L_T, which is constant."""
        mean, _ = self.q_posterior(self.predict(x_t, t, y), x_t, t)     # Eq. 11
        log_variance = self.log_variance(t, t - 1, self)                # Sec. 3.2
        terms = self.vlb_term(x_0, x_t, t, t - 1, mean, log_variance)   # (B,)
        return (self.T * terms).mean().to(x_0.dtype)                    # Eq. 5

    def draw_t(self, x_0):
        """A step of 1..T for each image, (B, 1, 1, 1)."""
        return torch.randint(1, self.T + 1, (len(x_0), 1, 1, 1), device=x_0.device)

    def eps_theta(self, x_t, t, y=None):
        return self.net(x_t, as_c_noise(t, x_t), y)

    # Reverse process

    def x_0_hat(self, x_t, t, eps):
        """The x_0 (B, C, H, W) that x_t comes from, if eps is its noise; Eq. 15."""
        alpha_bar = self.alpha_bar[t]
        x_0_hat = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()  # Eq. 15
        return x_0_hat.to(x_t.dtype)

    def predict(self, x_t, t, y=None):
        """x_0_hat (B, C, H, W), not clipped."""
        return self.x_0_hat(x_t, t, self.eps_theta(x_t, t, y))

    def clip_if_asked(self, x_0_hat):
        return x_0_hat.clamp(-1, 1) if self.clip else x_0_hat

    def p_mean_variance(self, x_t, t, s, y=None, chain=None):
        """Mean and log-variance of p_theta(x_s | x_t), and the x_0_hat they come from; Eq. 1.

        t and s count the steps of `chain`, by default all T of them. Through x_0_hat (Eq. 15)
        the mean is Eq. 11, where nothing is clipped.
        """
        if chain is None:
            chain = self
        x_0_hat = self.clip_if_asked(self.predict(x_t, chain.tau[t], y))
        mean, _ = chain.q_posterior(x_0_hat, x_t, t, s)                 # Eq. 11
        return mean, self.log_variance(t, s, chain), x_0_hat

    def log_variance(self, t, s, chain):
        """log sigma_t^2; Sec. 3.2."""
        log_beta_tilde = chain.log_beta_tilde(t, s)
        if self.variance == "small":
            return log_beta_tilde                                       # Sec. 3.2
        log_beta = chain.beta(t, s).log()                               # Sec. 3.2
        return torch.where(chain.tau[s] > 0, log_beta, log_beta_tilde)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        noise,
        y=None,
        *,
        steps: str | None = None,  # "50" evenly over 1..T, "quad50" dense at low t; default all
        eta: float | None = None,  # DDIM's eta, 0 deterministic; default ancestral, Algorithm 2
        randn_like=torch.randn_like,
    ):
        """From noise x_T (B, C, H, W) to images, yielding (x, x_0_hat) after each step.

        steps may also list the kept t, increasing. ValueError for an eta outside [0, 1].
        """
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {eta}")
        chain = Chain(self.alpha_bar.cpu(), self.kept_steps(steps))  # no step waits for a GPU
        if eta is None:
            yield from self.ancestral(noise, y, chain, randn_like)
        else:
            yield from self.ddim(noise, y, chain, eta, randn_like)

    def ancestral(self, noise, y, chain, randn_like):
        """Algorithm 2, whose t is the chain's k; its mu (Eq. 11) goes through x_0_hat."""
        x = noise                                                       # Algorithm 2, line 1
        for k in reversed(range(1, len(chain.tau))):                    # Algorithm 2, line 2
            z = randn_like(x) if k > 1 else torch.zeros_like(x)         # Algorithm 2, line 3
            mean, log_variance, x_0_hat = self.p_mean_variance(x, k, k - 1, y, chain)
            x = mean + (log_variance / 2).exp() * z                     # Algorithm 2, line 4
            yield x, x_0_hat

    def ddim(self, noise, y, chain, eta, randn_like):
        """DDIM on the steps of a chain; eps is formed again from the clipped x_0_hat."""
        x = noise
        for k in reversed(range(1, len(chain.tau))):
            z = randn_like(x)
            alpha_bar = chain.alpha_bar[k]
            alpha_bar_s = chain.alpha_bar[k - 1]
            x_0_hat = self.clip_if_asked(self.predict(x, chain.tau[k], y))
            eps = (x - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()  # Eq. 4
            share = (1 - alpha_bar_s) / (1 - alpha_bar)
            sigma = eta * share.sqrt() * (1 - alpha_bar / alpha_bar_s).sqrt()  # DDIM Eq. 16
            direction = (1 - alpha_bar_s - sigma**2).sqrt() * eps       # DDIM Eq. 12
            x = alpha_bar_s.sqrt() * x_0_hat + direction + sigma * z    # DDIM Eq. 12
            yield x, x_0_hat

    def kept_steps(self, steps):
        """[tau_1, ..., tau_K], increasing: `steps` of 1..T, evenly spaced, or the given list.

        "quad50" are 50 at 1 + floor(c k^2), fewer where some coincide. Both ends are kept; a
        single step is T. ValueError for a number outside 1..T.
        """
        if isinstance(steps, list):
            return steps
        spec = str(self.T if steps is None else steps)
        count = spec.removeprefix("quad")
        if not count.isdecimal() or not 1 <= int(count) <= self.T:
            raise ValueError(f"steps read like 50 or quad50 and lie in 1..{self.T}, got {spec}")
        K = int(count)
        if K == 1:
            return [self.T]
        if spec.startswith("quad"):
            positions = [(self.T - 1) * k**2 // (K - 1) ** 2 for k in range(K)]
            return sorted({1 + position for position in positions})     # DDIM App. D.2
        return torch.linspace(1, self.T, K, dtype=torch.float64).round().long().tolist()

    # Variational bound

    @torch.no_grad()
    def bits_per_dim(
        self, x_0, y=None, *, steps=None, randn_like=torch.randn_like, progress=iter
    ):
        """The bound on -log2 p(x_0) per dimension of 8-bit images in [-1, 1]; Eq. 5.

        One noise draw a term. Returns a dict of prior (B,), which is L_T; terms (B, K), L_0
        first; mse (B, K) of x_0_hat; total (B,). progress wraps the loop, as tqdm does.
        ValueError for fewer than 2 steps.
        """
        chain = Chain(self.alpha_bar.cpu(), self.kept_steps(steps))
        K = len(chain.tau) - 1
        if K < 2:
            raise ValueError("the bound needs 2 steps or more")
        terms = []
        mse = []
        for k in progress(range(1, K + 1)):
            x_t = chain.q_sample(x_0, k, randn_like(x_0))
            mean, log_variance, x_0_hat = self.p_mean_variance(x_t, k, k - 1, y, chain)
            terms.append(self.vlb_term(x_0, x_t, k, k - 1, mean, log_variance, chain))
            mse.append((x_0_hat - x_0).square().flatten(1).mean(1))
        alpha_bar = chain.alpha_bar[K]
        zero = torch.zeros_like(alpha_bar)
        mean = alpha_bar.sqrt() * x_0
        prior = normal_kl(mean, (1 - alpha_bar).log(), zero, zero)      # Eq. 5, L_T
        prior = prior.flatten(1).mean(1) / math.log(2)                  # (B,)
        terms = torch.stack(terms, dim=1)                               # (B, K)
        mse = torch.stack(mse, dim=1)                                   # (B, K)
        total = prior + terms.sum(1)                                    # Eq. 5
        return {"total": total, "prior": prior, "terms": terms, "mse": mse}

    def vlb_term(self, x_0, x_t, t, s, mean, log_variance, chain=None):
        """Term t of the bound for each image, (B,), bits/dim: L_0 where s = 0, else L_{t-1}."""
        if chain is None:
            chain = self
        x_0 = x_0.to(chain.alpha_bar.dtype)  # float32 saturates in Eq. 13
        mean = mean.to(chain.alpha_bar.dtype)
        posterior_mean, _ = chain.q_posterior(x_0, x_t.to(x_0.dtype), t, s)
        log_beta_tilde = chain.log_beta_tilde(t, s)
        kl = normal_kl(posterior_mean, log_beta_tilde, mean, log_variance)  # Eq. 5, L_{t-1}
        nll = -discretized_gaussian_log_likelihood(x_0, mean, log_variance / 2)  # Eq. 5, L_0
        has_noise = (chain.tau[s] > 0).to(kl.device)
        term = torch.where(has_noise, kl, nll)
        return term.flatten(1).mean(1) / math.log(2)


def as_c_noise(t, x):
    """The step t, a number or (B, 1, 1, 1), as the network is told it: (B,) float32."""
    if torch.is_tensor(t) and t.ndim > 0:
        return t.expand(len(x), 1, 1, 1).flatten().float()
    return torch.full((len(x),), float(t), device=x.device)


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) in nats, elementwise."""
    ratio = (log_variance_1 - log_variance_2).exp()
    distance = (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
    return (log_variance_2 - log_variance_1 - 1 + ratio + distance) / 2


def discretized_gaussian_log_likelihood(x_0, mean, log_std):
    """log p(x_0) in nats, elementwise, of pixels k/127.5 - 1 under N(mean, std^2); Eq. 13.

    Bins are 2/255 wide, the outer two endless. Phi is the authors' tanh; no p is below 1e-12.
    """

    def cdf(x):
        z = (x - mean) * (-log_std).exp()
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))           # Eq. 13, delta_+
    lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))          # Eq. 13, delta_-
    return (upper - lower).clamp(min=1e-12).log()
