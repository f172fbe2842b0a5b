"""Elucidating the Design Space of Diffusion-Based Generative Models.  Karras, Aittala, Aila & Laine, 2022.  arXiv:2206.00364

Noise is a matter of level alone: x = y + n with n ~ N(0, sigma^2 I). A denoiser D(x; sigma) gives the slope of an ODE that
carries noise to images, and everything else (network scaling, training noise, time steps, schedule, scaling, solver) can be
chosen apart. Table 1 writes four methods in these terms; here each of its rows is an argument.

    paper           code              shape          meaning
    y               x                 (B, C, H, W)   clean image in [-1, 1]; our y is the class label, as in the other files
    y + n, x        x + n, x          (B, C, H, W)   noisy image; in the sampler the state, s(t) (y + n)
    sigma           sigma             (B, 1, 1, 1)   noise level (a plain number is taken too)
    D(x; sigma)     D                 (B, C, H, W)   denoiser, E[y | y + n]; any function D(x, sigma, y) will do
    F_theta         self.net          (B, C, H, W)   raw network inside D
    lambda(sigma)   lambda_(sigma)    (B, 1, 1, 1)   weight of the loss
    t_i, t-hat_i    t[i], t_hat[i]    ()             time steps of the sampler, t_N = 0 (N is `steps`); the same with churn's noise
    u_j             u[j]              (M + 1,)       noise levels of the iDDPM column, falling to u_M = 0

`denoiser` makes D of any DDPM-type method, so that `ode_sample` and `ode_invert` serve all papers here. Where we differ from
the authors' code: the loss is a mean over pixels, theirs a sum (only clipping notices); VP's sigma goes through expm1 and
log1p; images are warped bilinearly, theirs with 2x oversampling by a sym6 wavelet, so ours are softer; the labels of the
augmentation enter as nine constant planes beside the image, theirs through the embedding.
"""
import math
from typing import Literal

import torch
from torch import nn


def vp_sigma(t, beta_d=19.9, beta_min=0.1):
    return torch.expm1(beta_d * t ** 2 / 2 + beta_min * t).sqrt()                                       # Table 1, VP schedule


def vp_sigma_inverse(sigma, beta_d=19.9, beta_min=0.1):
    return ((beta_min ** 2 + 2 * beta_d * torch.log1p(sigma ** 2)).sqrt() - beta_min) / beta_d          # Table 1, VP schedule


def iddpm_levels(M=1000, C_1=0.001, C_2=0.008):
    """u_0 > ... > u_M = 0, (M + 1,) float64: the noise levels of IDDPM's cosine schedule."""
    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2                                         # Table 1, iDDPM
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1) ** 0.5)             # Table 1, iDDPM
    return torch.tensor(u[::-1], dtype=torch.float64)


# Lowest and highest noise level at which each column of Table 1 samples.
RANGE = dict(edm=(0.002, 80.0), vp=vp_sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)).tolist(), ve=(0.02, 100.0), iddpm=(0.002, 81.0))


def sigma_steps(N, discretization="edm", sigma_min=None, sigma_max=None, rho=7):
    """Noise levels of N time steps, (N,) float64, falling from sigma_max to sigma_min, the final 0 not among them; Table 1.

    ValueError for an empty range, for N < 2 and for rho <= 0.
    """
    sigma_min, sigma_max = noise_range(discretization, sigma_min, sigma_max)
    if N < 2 or not 0 < sigma_min < sigma_max < math.inf or not rho > 0:
        raise ValueError(f"needs steps >= 2, rho > 0 and 0 < sigma_min < sigma_max; got {N}, {rho:g}, {sigma_min:g} and {sigma_max:g}")
    i = torch.arange(N, dtype=torch.float64) / (N - 1)
    if discretization == "edm":
        return (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho  # Eq. 5
    if discretization == "vp":
        return vp_sigma(1 + i * (1e-3 - 1), *vp_betas(sigma_min, sigma_max))                            # Table 1, VP
    if discretization == "ve":
        return sigma_max * (sigma_min / sigma_max) ** i                                                 # Table 1, VE: sqrt(t_i)
    u = iddpm_levels()
    u = u[(u >= sigma_min) & (u <= sigma_max)]                                                          # leaves out the first j_0
    if len(u) < 2:
        raise ValueError(f"no two of the iddpm levels lie between {sigma_min:g} and {sigma_max:g}")
    return u[((len(u) - 1) * i).round().long()]                                                         # Table 1, iDDPM


def vp_betas(sigma_min, sigma_max, eps_s=1e-3):
    """beta_d and beta_min for which VP's sigma(eps_s) = sigma_min and sigma(1) = sigma_max (in the code only)."""
    low, high = math.log1p(sigma_min ** 2), math.log1p(sigma_max ** 2)
    beta_d = 2 * (low / eps_s - high) / (eps_s - 1)
    return beta_d, high - beta_d / 2


def noise_range(discretization, sigma_min, sigma_max, D=None):
    """Lowest and highest noise level: those given or else the discretization's, narrowed to what D knows."""
    low, high = RANGE[check("discretization", discretization, RANGE)]
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    return max(low, getattr(D, "sigma_min", 0)), min(high, getattr(D, "sigma_max", math.inf))


def schedule_and_scaling(schedule, scaling, beta_d, beta_min):
    """sigma(t), its inverse and its derivative, s(t) and its derivative; Table 1."""
    sigma, inverse, sigma_dot = {
        "linear": (lambda t: t, lambda sigma: sigma, torch.ones_like),                                  # Table 1, EDM
        "ve": (torch.sqrt, torch.square, lambda t: 1 / (2 * t.sqrt())),                                 # Table 1, VE
        "vp": (lambda t: vp_sigma(t, beta_d, beta_min), lambda sigma: vp_sigma_inverse(sigma, beta_d, beta_min),
               lambda t: (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)) / 2),                      # Table 1, VP
    }[check("schedule", schedule, ("linear", "vp", "ve"))]
    s, s_dot = {
        "none": (torch.ones_like, torch.zeros_like),                                                    # Table 1, EDM
        "vp": (lambda t: 1 / (1 + sigma(t) ** 2).sqrt(), lambda t: -sigma(t) * sigma_dot(t) * s(t) ** 3),  # Table 1, VP
    }[check("scaling", scaling, ("none", "vp"))]
    return sigma, inverse, sigma_dot, s, s_dot


@torch.no_grad()
def ode_sample(D, noise, y=None, *,
               steps: int = 18,               # N, time steps; Heun evaluates the network 2N - 1 times, Euler N times
               solver: Literal["heun", "euler"] = "heun",  # heun corrects each step once (Algorithm 1), euler does not
               discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm",  # where the noise levels lie (Table 1, time steps)
               schedule: Literal["linear", "vp", "ve"] = "linear",  # sigma(t) (Table 1)
               scaling: Literal["none", "vp"] = "none",  # s(t) (Table 1)
               alpha: float = 1.0,            # Heun's second evaluation, at t + alpha h: 1 Heun, 2/3 Ralston, 1/2 midpoint (Algorithm 3)
               S_churn: float = 0.0,          # fresh noise; 0 is deterministic (Algorithm 2, Table 5)
               S_tmin: float = 0.0,           # churn from this noise level (Table 5)
               S_tmax: float = math.inf,      # churn up to this noise level (Table 5)
               S_noise: float = 1.0,          # inflation of the fresh noise (Table 5)
               sigma_min: float | None = None,  # lowest noise level; default the discretization's, never below the network's
               sigma_max: float | None = None,  # highest noise level; default the discretization's, never above the network's
               rho: float = 7.0,              # larger spends more of the edm steps near sigma_min (Eq. 5)
               randn_like=torch.randn_like):
    """From unit-variance noise (B, C, H, W) to images, yielding (x, denoised) after each step: Algorithms 1, 2 and 3 in one.

    By default sigma(t) = t and s(t) = 1, which makes it Algorithm 2. D(x, sigma, y) gets x in float64 where the device has it and may have sigma_min,
    sigma_max and round_sigma. One randn_like a step, used or not; the last step is Euler's, as in the authors' code. ValueError for options that cannot be.
    """
    check("solver", solver, ("heun", "euler"))
    if min(S_churn, S_tmin, S_noise) < 0:
        raise ValueError(f"S_churn, S_tmin and S_noise must be 0 or more, got {S_churn:g}, {S_tmin:g} and {S_noise:g}")
    sigma_min, sigma_max = noise_range(discretization, sigma_min, sigma_max, D)
    sigmas = rounded(D, sigma_steps(steps, discretization, sigma_min, sigma_max, rho))
    sigma, sigma_inverse, sigma_dot, s, s_dot = schedule_and_scaling(schedule, scaling, *vp_betas(sigma_min, sigma_max))
    t = torch.cat([sigma_inverse(sigmas), sigmas.new_zeros(1)])                                         # t_N = 0
    gamma = ((S_tmin <= sigmas) & (sigmas <= S_tmax)).to(sigmas) * min(S_churn / steps, 2 ** 0.5 - 1)   # Algorithm 2, gamma_i
    t_hat = torch.where(gamma > 0, sigma_inverse(rounded(D, (1 + gamma) * sigmas)), t[:-1])             # Algorithm 2, line 5
    t_prime = t_hat + alpha * (t[1:] - t_hat)                                                           # Algorithm 3
    if not alpha > 0 or solver == "heun" and not ((t_prime > 0) & (sigma(t_prime) > 0))[:-1].all():
        raise ValueError(f"alpha must be above 0 and never step past noise level 0, got {alpha:g} for {steps} steps")

    def dx_dt(x, t):
        denoised = D(x / s(t).item(), level(sigma(t), x), y).to(x.dtype)
        slope = (sigma_dot(t) / sigma(t) + s_dot(t) / s(t)).item() * x - (sigma_dot(t) * s(t) / sigma(t)).item() * denoised  # Eq. 4
        return slope, denoised

    x = (sigma(t[0]) * s(t[0])).item() * noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)  # Algorithm 2, line 2
    for i in range(steps):                                                                              # Algorithm 2, line 3
        eps = S_noise * randn_like(x)                                                                   # Algorithm 2, line 4
        sigma_added = (sigma(t_hat[i]) ** 2 - sigmas[i] ** 2).clamp(min=0).sqrt()
        x_hat = (s(t_hat[i]) / s(t[i])).item() * x + (s(t_hat[i]) * sigma_added).item() * eps           # Algorithm 2, line 6
        d, denoised = dx_dt(x_hat, t_hat[i])                                                            # Algorithm 2, line 7
        h = (t[i + 1] - t_hat[i]).item()
        x = x_hat + h * d                                                                               # Algorithm 2, line 8
        if t[i + 1] != 0 and solver == "heun":                                                          # Algorithm 2, line 9
            d_prime, _ = dx_dt(x_hat + alpha * h * d, t_prime[i])                                       # Algorithm 2, line 10; 3
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)                     # Algorithm 2, line 11; 3
        yield x.to(noise.dtype), denoised.to(noise.dtype)


@torch.no_grad()
def ode_invert(D, x_0, y=None, *, steps=18, rho=3, sigma_min=None, sigma_max=None):
    """The unit-variance latent from which `ode_sample`, with the same steps and rho, returns the images x_0; Sec. 4, App. D.1."""
    def dx_dt(x, t):
        return (x - D(x, level(t, x), y)) / t.item()                                                    # Eqs. 1 and 3
    t = rounded(D, sigma_steps(steps, "edm", *noise_range("edm", sigma_min, sigma_max, D), rho)).flip(0)
    x = x_0.to(torch.float32 if x_0.device.type == "mps" else torch.float64)
    for i in range(steps - 1):
        h, d = (t[i + 1] - t[i]).item(), dx_dt(x, t[i])
        x = x + h * (d + dx_dt(x + h * d, t[i + 1])) / 2                                                # Algorithm 1, upwards
    return (x / t[-1].item()).to(x_0.dtype)


class EDM(nn.Module):
    """A preconditioned denoiser (Eq. 7), its loss (Eq. 8) and its sampler (Algorithm 2). It is its own D."""
    def __init__(self, make_net, channels, *,
                 precond: Literal["edm", "vp", "ve", "iddpm"] = "edm",  # c_skip, c_out, c_in and c_noise of this column (Table 1)
                 p_train: Literal["edm", "vp", "ve", "iddpm"] | None = None,  # noise levels of training; default the column of precond
                 weight: Literal["edm", "vp", "ve", "iddpm"] | None = None,  # lambda(sigma); default the column of precond
                 sigma_data: float = 0.5,    # standard deviation of the training images (Table 1)
                 P_mean: float = -1.2,       # mean of ln(sigma) in training; -1.2 in Table 1
                 P_std: float = 1.2,         # standard deviation of ln(sigma) in training (Table 1)
                 augment: float = 0.0):      # probability of each geometric augmentation (Table 6), mirroring included
        super().__init__()
        self.precond, self.p_train, self.weight = (check("column", c, RANGE) for c in (precond, p_train or precond, weight or precond))
        self.sigma_data, self.P_mean, self.P_std, self.augment = sigma_data, P_mean, P_std, augment
        self.net = make_net(channels + 9 if augment else channels, channels)
        self.register_buffer("u", iddpm_levels(), persistent=False)
        self.sigma_min, self.sigma_max = dict(edm=(0.0, math.inf), vp=vp_sigma(self.u.new_tensor([1e-5, 1])).tolist(),
                                              ve=RANGE["ve"], iddpm=self.u[[-2, 0]].tolist())[self.precond]

    def coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise, each in the shape of sigma, float64 also for a plain number; Table 1."""
        sigma, sigma_data, M = torch.as_tensor(sigma, dtype=self.u.dtype, device=self.u.device), self.sigma_data, len(self.u) - 1
        one = torch.ones_like(sigma)
        if self.precond == "edm":
            c_skip = sigma_data ** 2 / (sigma ** 2 + sigma_data ** 2)                                   # Table 1, EDM c_skip
            c_out = sigma * sigma_data / (sigma ** 2 + sigma_data ** 2).sqrt()                          # Table 1, EDM c_out
            c_in = 1 / (sigma ** 2 + sigma_data ** 2).sqrt()                                            # Table 1, EDM c_in
            return c_skip, c_out, c_in, sigma.log() / 4                                                 # Table 1, EDM c_noise
        if self.precond == "ve":
            return one, sigma, one, (sigma / 2).log()                                                   # Table 1, VE
        c_in = 1 / (sigma ** 2 + 1).sqrt()                                                              # Table 1, VP and iDDPM
        if self.precond == "vp":
            return one, -sigma, c_in, (M - 1) * vp_sigma_inverse(sigma)                                 # Table 1, VP
        return one, -sigma, c_in, M - 1 - nearest(self.u, sigma)                                        # Table 1, iDDPM

    def D(self, x, sigma, y=None, labels=None):
        """Denoised images (B, C, H, W), in x's type; the network runs in its own. labels (B, 9) are those of `augment`."""
        c_skip, c_out, c_in, c_noise = (c.to(x.dtype).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1) for c in self.coefficients(sigma))
        x_in = (c_in * x).to(next(self.parameters(), x).dtype)
        if self.augment:
            labels = x_in.new_zeros(len(x), 9) if labels is None else labels                            # App. F.2: 0 in sampling
            x_in = torch.cat([x_in, labels[:, :, None, None].expand(-1, -1, *x.shape[2:])], dim=1)      # (B, C + 9, H, W)
        return (c_skip * x + c_out * self.net(x_in, c_noise.flatten().float(), y)).to(x.dtype)          # Eq. 7

    forward, sample = D, ode_sample          # an EDM is its own D

    def round_sigma(self, sigma):
        """The nearest noise level that the network knows."""
        return self.u[nearest(self.u, sigma)] if self.precond == "iddpm" else sigma

    def loss(self, x, y=None):
        """E lambda(sigma) ||D(x + n; sigma) - x||^2 over images in [-1, 1], as a mean over pixels; Eqs. 2 and 8."""
        x, labels = augment(x, self.augment) if self.augment else (x, None)
        sigma = self.draw_sigma(len(x))
        n = sigma.to(x.dtype) * torch.randn_like(x)
        return (self.lambda_(sigma).to(x.dtype) * (self.D(x + n, sigma, y, labels) - x).square()).mean()  # Eq. 8

    def draw_sigma(self, B):
        """Noise levels to train at, (B, 1, 1, 1); Table 1, noise distribution."""
        uniform, normal = (draw((B, 1, 1, 1), dtype=self.u.dtype, device=self.u.device) for draw in (torch.rand, torch.randn))
        if self.p_train == "edm":
            return (self.P_mean + self.P_std * normal).exp()                                            # Table 1, EDM
        if self.p_train == "vp":
            return vp_sigma(1 + uniform * (1e-5 - 1))                                                   # Table 1, VP
        if self.p_train == "ve":
            return 0.02 * (100 / 0.02) ** uniform                                                       # Table 1, VE
        return self.u[(uniform * (len(self.u) - 1)).long()]                                             # Table 1, iDDPM

    def lambda_(self, sigma):
        if self.weight == "edm":
            return (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2                 # Table 1, EDM
        return 1 / sigma ** 2                                                                           # Table 1, the others


def denoiser(method):
    """D(x, sigma, y), with sigma_min, sigma_max and round_sigma, of an EDM or of any method with `alpha_bar` and `predict`."""
    return method if isinstance(method, EDM) else FromDDPM(method)


class FromDDPM:
    """A network trained at steps t knows the noise levels sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t); Table 1, App. C.3."""
    def __init__(self, method):
        alpha_bar = method.alpha_bar[1:]
        self.method, self.sigma = method, ((1 - alpha_bar) / alpha_bar).sqrt()                          # App. C.3, (T,)
        self.sigma_min, self.sigma_max = self.sigma[[0, -1]].tolist()

    def round_sigma(self, sigma):
        return self.sigma[nearest(self.sigma, sigma)]

    def __call__(self, x, sigma, y=None):
        """x_0_hat (B, C, H, W), not clipped, in x's type, at the known level nearest to sigma."""
        t = 1 + nearest(self.sigma, sigma).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        x_t = self.method.alpha_bar[t].sqrt() * x                                                       # Table 1, VP scaling
        return self.method.predict(x_t.to(next(self.method.parameters(), x).dtype), t, y).to(x.dtype)


def augment(x, p):
    """Images (B, C, H, W) warped at random and what was done to each, (B, 9), all 0 for nothing; Table 6, App. F.2."""
    def scale(a, b):
        return torch.stack([a, b], dim=1).diag_embed()                                                  # (B, 2, 2)
    def rotation(angle):
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))  # (B, 2, 2)

    B, _, H, W = x.shape
    uniform, normal = torch.rand(B, 12, device=x.device), torch.randn(B, 4, device=x.device)
    on = (uniform[:, :6] < x.new_tensor([1, p, p, p, p, p], dtype=torch.float32)).float().unbind(1)     # Table 6, enabled with
    flip_x, flip_y = (on[k] * (uniform[:, 6 + k] < 0.5) for k in (0, 1))                                # Table 6, a_0 and a_1
    octaves, angle = on[2] * normal[:, 0], on[3] * math.pi * (2 * uniform[:, 8] - 1)                    # Table 6, a_2 and a_3
    axis, stretch = on[4] * math.pi * (2 * uniform[:, 9] - 1), on[4] * normal[:, 1]                     # Table 6, a_4 and a_5
    move_x, move_y = on[5] * normal[:, 2], on[5] * normal[:, 3]                                         # Table 6, a_6 and a_7
    back = scale(1 - 2 * flip_x, 1 - 2 * flip_y) @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves)) @ rotation(angle)
    back = back @ rotation(axis) @ scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) @ rotation(-axis) # from warped pixel to source
    half = x.new_tensor([[W / 2, H / 2]], dtype=torch.float32)
    back = back * half[:, None] / half[:, :, None]                                                      # in units of half the image
    shift = torch.stack([move_x, move_y], dim=1)[:, :, None] / 4                                        # 1/8 of the size
    grid = nn.functional.affine_grid(torch.cat([back, -back @ shift], dim=2), [B, 1, H, W], align_corners=False)    # (B, H, W, 2)
    labels = [flip_x, flip_y, octaves, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin(), move_x, move_y]
    return nn.functional.grid_sample(x, grid.to(x.dtype), padding_mode="reflection", align_corners=False), torch.stack(labels, dim=1)


def nearest(levels, sigma):
    return (levels - torch.as_tensor(sigma).to(levels)[..., None]).abs().argmin(-1)


def rounded(D, sigma):
    return D.round_sigma(sigma).cpu().double() if hasattr(D, "round_sigma") else sigma


def level(sigma, x):
    return torch.full((len(x), 1, 1, 1), sigma.item(), dtype=x.dtype, device=x.device)


def check(what, value, options):
    if value not in options:
        raise ValueError(f"{what} must be one of {', '.join(options)}, got {value!r}")
    return value
