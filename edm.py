"""Elucidating the Design Space of Diffusion-Based Generative Models.
Karras, Aittala, Aila & Laine, 2022.  arXiv:2206.00364

Noise is a matter of level alone: x = y + n with n ~ N(0, sigma^2 I). A denoiser D(x; sigma)
gives the slope of an ODE that carries noise to images, and everything else (network scaling,
training noise, time steps, schedule, scaling, solver) can be chosen apart. Table 1 writes four
methods in these terms; here each column is a class with a method for each row.

    paper           code             shape          meaning
    y               x                (B, C, H, W)   clean image in [-1, 1]; our y is the class
    y + n           x + n            (B, C, H, W)   noisy image, which is x inside D
    x               x                (B, C, H, W)   in the samplers the state, s(t) (y + n)
    sigma           sigma            (B, 1, 1, 1)   noise level, or a plain number
    D(x; sigma)     D                (B, C, H, W)   denoiser, E[y | y + n]
    F_theta         self.net         (B, C, H, W)   raw network inside D
    lambda(sigma)   lambda_(sigma)   (B, 1, 1, 1)   weight of the loss
    t_i, t-hat_i    t[i], t_hat      ()             time steps, t_N = 0; with churn's noise
    N               steps                           number of time steps
    u_j             u[j]             (M + 1,)       noise levels of column iDDPM; u_M = 0
                    planes           (B, k, H, W)   what the network sees beside c_in x

`denoiser` makes D of any method, so that `ode_sample` and `ode_invert` serve all papers here.
Where we differ from the authors' code: the loss is a mean over pixels, theirs a sum (Adam does
not notice, clipping does); VP's sigma goes through expm1 and log1p; images are warped
bilinearly, theirs with 2x oversampling by a sym6 wavelet, so ours are softer; the labels of
the augmentation enter as nine constant planes, theirs through the embedding. Half of their
stretches lie exactly along x, and for the same label they stretch along -a_4; ours follow
Table 6.
"""
import math
from typing import Literal

import torch
from torch import nn

ColumnName = Literal["edm", "vp", "ve", "iddpm"]


# Table 1, a class for each column

class Column(nn.Module):
    """sigma(t) = t and weight 1/sigma^2, unless a column says otherwise.

    A column adds `sampling_range` and `trained_range`, the noise levels of its sampler and of
    its training; `levels`, `coefficients` and `training_sigma`.
    """

    def sigma(self, t):
        return t                                                        # Table 1, schedule

    def t(self, sigma):
        return sigma

    def sigma_dot(self, t):
        return torch.ones_like(t)

    def loss_weight(self, sigma):
        return 1 / sigma**2                                             # Table 1, weighting

    def round_sigma(self, sigma):
        """The nearest noise level that a network of this column knows."""
        return sigma


class ColumnVP(Column):
    """Variance preserving: DDPM in continuous time (Song et al. 2021)."""

    M = 1000
    eps_s = 1e-3  # smallest t of the sampler
    eps_t = 1e-5  # smallest t of training

    def __init__(self, beta_d=19.9, beta_min=0.1):
        super().__init__()
        self.beta_d = beta_d
        self.beta_min = beta_min
        t = torch.tensor([self.eps_s, self.eps_t, 1.0], dtype=torch.float64)
        low, lowest, high = self.sigma(t).tolist()
        self.sampling_range = (low, high)
        self.trained_range = (lowest, high)

    def sigma(self, t):
        exponent = self.beta_d * t**2 / 2 + self.beta_min * t
        return torch.expm1(exponent).sqrt()                             # Table 1, VP schedule

    def t(self, sigma):
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt()
        return (root - self.beta_min) / self.beta_d  # the inverse of sigma(t)

    def sigma_dot(self, t):  # the derivative of sigma(t)
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma) / 2

    def levels(self, share, sigma_min, sigma_max, rho):
        t = 1 + share * (self.eps_s - 1)                                # Table 1, VP time steps
        return vp_between(sigma_min, sigma_max).sigma(t)

    def coefficients(self, sigma):
        c_skip = torch.ones_like(sigma)                                 # Table 1, VP c_skip
        c_out = -sigma                                                  # Table 1, VP c_out
        c_in = 1 / (sigma**2 + 1).sqrt()                                # Table 1, VP c_in
        c_noise = (self.M - 1) * self.t(sigma)                          # Table 1, VP c_noise
        return c_skip, c_out, c_in, c_noise

    def training_sigma(self, shape, **of):
        t = 1 + torch.rand(shape, **of) * (self.eps_t - 1)              # Table 1, VP noise
        return self.sigma(t)


class ColumnVE(Column):
    """Variance exploding: score matching in continuous time (Song et al. 2021)."""

    sampling_range = (0.02, 100.0)
    trained_range = (0.02, 100.0)

    def sigma(self, t):
        return t.sqrt()                                                 # Table 1, VE schedule

    def t(self, sigma):
        return sigma**2

    def sigma_dot(self, t):
        return 1 / (2 * t.sqrt())

    def levels(self, share, sigma_min, sigma_max, rho):
        return sigma_max * (sigma_min / sigma_max) ** share             # Table 1, VE time steps

    def coefficients(self, sigma):
        c_skip = torch.ones_like(sigma)                                 # Table 1, VE c_skip
        c_out = sigma                                                   # Table 1, VE c_out
        c_in = torch.ones_like(sigma)                                   # Table 1, VE c_in
        c_noise = (sigma / 2).log()                                     # Table 1, VE c_noise
        return c_skip, c_out, c_in, c_noise

    def training_sigma(self, shape, **of):
        low, high = self.trained_range
        return low * (high / low) ** torch.rand(shape, **of)            # Table 1, VE noise


class ColumnIDDPM(Column):
    """Improved DDPM, whose network knows the M levels of its cosine schedule."""

    M = 1000
    sampling_range = (0.002, 81.0)

    def __init__(self):
        super().__init__()
        u = iddpm_levels(self.M)                                        # (M + 1,)
        self.trained_range = (u[-2].item(), u[0].item())
        self.register_buffer("u", u, persistent=False)
        self.numbers = u.tolist()

    def levels(self, share, sigma_min, sigma_max, rho):
        u = self.u[(self.u >= sigma_min) & (self.u <= sigma_max)]  # leaves out the first j_0
        if len(u) < 2:
            raise ValueError(f"no two iddpm levels lie between {sigma_min:g} and {sigma_max:g}")
        return u[((len(u) - 1) * share).round().long()]                 # Table 1, iDDPM steps

    def coefficients(self, sigma):
        c_skip = torch.ones_like(sigma)                                 # Table 1, iDDPM c_skip
        c_out = -sigma                                                  # Table 1, iDDPM c_out
        c_in = 1 / (sigma**2 + 1).sqrt()                                # Table 1, iDDPM c_in
        c_noise = self.M - 1 - nearest(self.u, sigma)                   # Table 1, iDDPM c_noise
        return c_skip, c_out, c_in, c_noise

    def training_sigma(self, shape, **of):
        return self.u[(torch.rand(shape, **of) * self.M).long()]        # Table 1, iDDPM noise

    def round_sigma(self, sigma):
        if torch.is_tensor(sigma):
            return self.u[nearest(self.u, sigma)]
        return min(self.numbers, key=lambda u: abs(u - sigma))


class ColumnEDM(Column):
    """The authors' own choices."""

    sampling_range = (0.002, 80.0)
    trained_range = (0.0, math.inf)

    def __init__(self, sigma_data=0.5, P_mean=-1.2, P_std=1.2):
        super().__init__()
        self.sigma_data = sigma_data
        self.P_mean = P_mean
        self.P_std = P_std

    def levels(self, share, sigma_min, sigma_max, rho):
        low = sigma_min ** (1 / rho)
        high = sigma_max ** (1 / rho)
        return (high + share * (low - high)) ** rho                     # Eq. 5

    def coefficients(self, sigma):
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance                          # Table 1, EDM c_skip
        c_out = sigma * self.sigma_data / variance.sqrt()               # Table 1, EDM c_out
        c_in = 1 / variance.sqrt()                                      # Table 1, EDM c_in
        c_noise = sigma.log() / 4                                       # Table 1, EDM c_noise
        return c_skip, c_out, c_in, c_noise

    def training_sigma(self, shape, **of):
        log_sigma = self.P_mean + self.P_std * torch.randn(shape, **of)
        return log_sigma.exp()                                          # Table 1, EDM noise

    def loss_weight(self, sigma):
        variance = sigma**2 + self.sigma_data**2
        return variance / (sigma * self.sigma_data) ** 2                # Table 1, EDM weighting


COLUMNS = {"edm": ColumnEDM, "vp": ColumnVP, "ve": ColumnVE, "iddpm": ColumnIDDPM}


def vp_between(sigma_min, sigma_max, eps_s=1e-3):
    """VP with sigma(eps_s) = sigma_min and sigma(1) = sigma_max (the authors' code alone)."""
    low = math.log1p(sigma_min**2)
    high = math.log1p(sigma_max**2)
    beta_d = 2 * (low / eps_s - high) / (eps_s - 1)
    return ColumnVP(beta_d, high - beta_d / 2)


def iddpm_levels(M=1000, C_1=0.001, C_2=0.008):
    """u_0 > ... > u_M = 0, (M + 1,) float64: the noise levels of IDDPM's cosine schedule."""

    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2         # Table 1, iDDPM steps

    u = [0.0]  # u_M; then u_j is the last one, and u_{j-1} is added
    for j in range(M, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), C_1)
        u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))               # Table 1, iDDPM steps
    return torch.tensor(u[::-1], dtype=torch.float64)


# Time steps

def sigma_steps(N, discretization="edm", sigma_min=None, sigma_max=None, rho=7):
    """Noise levels of N time steps, (N,) float64, falling from sigma_max to sigma_min; Table 1.

    The final 0 is not among them. ValueError for an empty range, for N < 2 and for rho <= 0.
    """
    sigma_min, sigma_max = noise_range(discretization, sigma_min, sigma_max)
    if N < 2 or not rho > 0:
        raise ValueError(f"steps must be 2 or more and rho above 0, got {N} and {rho:g}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min {sigma_min:g} must lie in 0 to sigma_max {sigma_max:g}")
    share = torch.arange(N, dtype=torch.float64) / (N - 1)  # i / (N - 1) of Table 1
    return COLUMNS[discretization]().levels(share, sigma_min, sigma_max, rho)


def noise_range(discretization, sigma_min=None, sigma_max=None, D=None):
    """Lowest and highest noise level: those given, or the column's, within what D knows."""
    check("discretization", discretization, COLUMNS)
    low, high = COLUMNS[discretization]().sampling_range
    if sigma_min is not None:
        low = sigma_min
    if sigma_max is not None:
        high = sigma_max
    return max(low, getattr(D, "sigma_min", 0)), min(high, getattr(D, "sigma_max", math.inf))


def rounded(D, sigmas):
    """Noise levels (N,) float64, on the CPU, each the nearest that D knows."""
    if not hasattr(D, "round_sigma"):
        return sigmas
    known = [float(D.round_sigma(sigma)) for sigma in sigmas.tolist()]
    return torch.tensor(known, dtype=torch.float64)


class EDM(nn.Module):
    """A preconditioned denoiser (Eq. 7), its loss (Eq. 8) and its sampler (Algorithm 2)."""

    def __init__(
        self,
        make_net,
        channels,
        *,
        precond: ColumnName = "edm",  # column of c_skip, c_out, c_in and c_noise (Table 1)
        p_train: ColumnName | None = None,  # column of training's noise; default precond's
        weight: ColumnName | None = None,  # column of lambda(sigma); default that of precond
        sigma_data: float = 0.5,  # standard deviation of the training images (Table 1)
        P_mean: float = -1.2,  # mean of ln(sigma) in training; -1.2 in Table 1
        P_std: float = 1.2,  # standard deviation of ln(sigma) in training (Table 1)
        augment: float = 0.0,  # probability of each geometric augmentation, mirroring too
    ):
        super().__init__()

        def column(name):
            check("column", name, COLUMNS)
            return ColumnEDM(sigma_data, P_mean, P_std) if name == "edm" else COLUMNS[name]()

        self.precond = column(precond)
        self.p_train = column(p_train or precond)
        self.weight = column(weight or precond)
        self.augment = augment
        planes = 9 if augment else 0
        self.net = make_net(channels + planes, channels)
        self.sigma_min, self.sigma_max = self.precond.trained_range

    # Preconditioning

    def coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise of noise levels sigma, each in its shape; Table 1."""
        sigma = torch.as_tensor(sigma)
        return self.precond.coefficients(sigma.to(widest_float(sigma.device)))

    def D(self, x, sigma, y=None, planes=None):
        """Denoised images (B, C, H, W) of noisy ones, in x's type; the network runs in its own.

        planes (B, k, H, W) are what it sees beside the image, by default those of sampling.
        """
        sigma = sigma_of_each(sigma, x)                                 # (B, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        x_in = (c_in * x).to(type_of(self.net, x))
        if planes is None:
            planes = self.sampling_planes(x)
        if planes is not None:
            x_in = torch.cat([x_in, planes.to(x_in.dtype)], dim=1)      # (B, C + k, H, W)
        F_x = self.net(x_in, c_noise.flatten().float(), y)              # (B, C, H, W)
        return (c_skip * x + c_out * F_x).to(x.dtype)                   # Eq. 7

    def forward(self, x, sigma, y=None):
        return self.D(x, sigma, y)

    def sampling_planes(self, x):
        """Labels of no augmentation, (B, 9, H, W) zeros; None without augment; App. F.2."""
        return x.new_zeros(len(x), 9, *x.shape[2:]) if self.augment else None

    def round_sigma(self, sigma):
        """The nearest noise level that the network knows."""
        return self.precond.round_sigma(sigma)

    # Training

    def loss(self, x, y=None):
        """E lambda(sigma) ||D(x + n; sigma) - x||^2 of images in [-1, 1], mean over pixels."""
        if not self.augment:
            return self.weighted_error(x, y)
        x, labels = augment(x, self.augment)
        planes = labels[:, :, None, None].expand(-1, -1, *x.shape[2:])  # (B, 9, H, W)
        return self.weighted_error(x, y, planes)

    def weighted_error(self, x, y=None, planes=None):
        sigma = self.draw_sigma(len(x), x.device)                       # (B, 1, 1, 1)
        n = sigma.to(x.dtype) * torch.randn_like(x)
        error = (self.D(x + n, sigma, y, planes) - x).square()          # Eq. 2
        # In D's terms: c_out^2 ||F - its target||^2 is ||D - x||^2
        return (self.lambda_(sigma).to(x.dtype) * error).mean()         # Eq. 8

    def draw_sigma(self, B, device="cpu"):
        """Noise levels to train at, (B, 1, 1, 1); Table 1."""
        dtype = widest_float(device)
        return self.p_train.training_sigma((B, 1, 1, 1), dtype=dtype, device=device)

    def lambda_(self, sigma):
        return self.weight.loss_weight(sigma)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        noise,
        y=None,
        *,
        steps: int = 18,  # N, time steps; the network is evaluated 2N - 1 times
        S_churn: float = 0.0,  # fresh noise; 0 is deterministic (Table 5)
        S_tmin: float = 0.0,  # churn from this noise level (Table 5)
        S_tmax: float = math.inf,  # churn up to this noise level (Table 5)
        S_noise: float = 1.0,  # inflation of the fresh noise (Table 5)
        sigma_min: float | None = None,  # lowest noise level; default 0.002
        sigma_max: float | None = None,  # highest noise level; default 80
        rho: float = 7.0,  # larger spends more of the steps near sigma_min (Eq. 5)
        randn_like=torch.randn_like,
        planes=None,
    ):
        """From unit-variance noise (B, C, H, W) to images, yielding (x, denoised) each step.

        x is x_i up to line 8 and x_{i+1} after it. ValueError for options outside their range.
        """
        check_churn(S_churn, S_tmin, S_noise)
        N = steps
        sigma_min, sigma_max = noise_range("edm", sigma_min, sigma_max, self)
        t = rounded(self, sigma_steps(N, "edm", sigma_min, sigma_max, rho)).tolist() + [0.0]
        x = t[0] * noise.to(widest_float(noise.device))                 # Algorithm 2, line 2
        for i in range(N):                                              # Algorithm 2, line 3
            # Algorithm 2, gamma_i
            gamma = min(S_churn / N, 2**0.5 - 1) if S_tmin <= t[i] <= S_tmax else 0.0
            eps = S_noise * randn_like(x)                               # Algorithm 2, line 4
            # Rounded where the network knows some levels only; App. C.3
            t_hat = self.round_sigma(t[i] + gamma * t[i])               # Algorithm 2, line 5
            x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * eps             # Algorithm 2, line 6
            denoised = self.D(x_hat, t_hat, y, planes)
            d = (x_hat - denoised) / t_hat                              # Algorithm 2, line 7
            x = x_hat + (t[i + 1] - t_hat) * d                          # Algorithm 2, line 8
            if t[i + 1] != 0:                                           # Algorithm 2, line 9
                denoised_prime = self.D(x, t[i + 1], y, planes)
                d_prime = (x - denoised_prime) / t[i + 1]               # Algorithm 2, line 10
                x = x_hat + (t[i + 1] - t_hat) * (d + d_prime) / 2      # Algorithm 2, line 11
            yield x.to(noise.dtype), denoised.to(noise.dtype)


# The general solver

class Path:
    """x(t) = s(t) (y + n), where n has level sigma(t): Table 1's schedule and scaling."""

    def __init__(self, schedule, scaling, sigma_min, sigma_max):
        check("schedule", schedule, ("linear", "vp", "ve"))
        check("scaling", scaling, ("none", "vp"))
        columns = {"linear": Column(), "vp": vp_between(sigma_min, sigma_max), "ve": ColumnVE()}
        self.sigma = columns[schedule].sigma
        self.sigma_dot = columns[schedule].sigma_dot
        self.t = columns[schedule].t
        self.scaling = scaling

    def s(self, t):
        if self.scaling == "none":
            return torch.ones_like(t)                                   # Table 1, scaling
        return 1 / (1 + self.sigma(t) ** 2).sqrt()                      # Table 1, VP scaling

    def s_dot(self, t):  # the derivative of s(t)
        if self.scaling == "none":
            return torch.zeros_like(t)
        return -self.sigma(t) * self.sigma_dot(t) * self.s(t) ** 3

    def dx_dt(self, D, x, t, y):
        """Slope of the ODE at x (B, C, H, W) and time t (), and the denoised images; Eq. 4."""
        sigma = self.sigma(t)
        sigma_dot = self.sigma_dot(t)
        s = self.s(t)
        denoised = D(x / s.item(), sigma_of_each(sigma, x), y).to(x.dtype)
        of_x = (sigma_dot / sigma + self.s_dot(t) / s).item()           # Algorithm 1, line 4
        of_D = (sigma_dot * s / sigma).item()                           # Algorithm 1, line 4
        return of_x * x - of_D * denoised, denoised                     # Algorithm 1, line 4


@torch.no_grad()
def ode_sample(
    D,
    noise,
    y=None,
    *,
    steps: int = 18,  # N, time steps; Heun evaluates the network 2N - 1 times, Euler N times
    solver: Literal["heun", "euler"] = "heun",  # heun corrects each step once (Algorithm 1)
    discretization: ColumnName = "edm",  # where the noise levels lie (Table 1, time steps)
    schedule: Literal["linear", "vp", "ve"] = "linear",  # sigma(t) (Table 1)
    scaling: Literal["none", "vp"] = "none",  # s(t) (Table 1)
    alpha: float = 1.0,  # second evaluation at t + alpha h: 1 Heun, 1/2 midpoint (Algorithm 3)
    S_churn: float = 0.0,  # fresh noise; 0 is deterministic (Algorithm 2, Table 5)
    S_tmin: float = 0.0,  # churn from this noise level (Table 5)
    S_tmax: float = math.inf,  # churn up to this noise level (Table 5)
    S_noise: float = 1.0,  # inflation of the fresh noise (Table 5)
    sigma_min: float | None = None,  # lowest noise level; default the discretization's
    sigma_max: float | None = None,  # highest noise level; default the discretization's
    rho: float = 7.0,  # larger spends more of the edm steps near sigma_min (Eq. 5)
    randn_like=torch.randn_like,
):
    """From unit-variance noise (B, C, H, W) to images, yielding (x, denoised) after each step.

    Algorithm 1 with the alpha of Algorithm 3 and the churn of Algorithm 2; by default it is
    Algorithm 2. The last step is always Euler's, as in the authors' code. D(x, sigma, y) gets x
    in float64 where the device has it, and sigma (B, 1, 1, 1); it may have sigma_min, sigma_max
    and round_sigma. One randn_like a step, used or not. ValueError for options outside their
    range.
    """
    check("solver", solver, ("heun", "euler"))
    check_churn(S_churn, S_tmin, S_noise)
    sigma_min, sigma_max = noise_range(discretization, sigma_min, sigma_max, D)
    path = Path(schedule, scaling, sigma_min, sigma_max)
    sigmas = rounded(D, sigma_steps(steps, discretization, sigma_min, sigma_max, rho))
    t = torch.cat([path.t(sigmas), sigmas.new_zeros(1)])                # (N + 1,), t_N = 0
    churned = (S_tmin <= sigmas) & (sigmas <= S_tmax)
    gamma = churned.to(sigmas) * min(S_churn / steps, 2**0.5 - 1)       # Algorithm 2, gamma_i
    t_hat = path.t(rounded(D, (1 + gamma) * sigmas))                    # Algorithm 2, line 5
    t_prime = t_hat + alpha * (t[1:] - t_hat)                           # Algorithm 3, line 6
    check_times(path, t_hat, t_prime, alpha)
    x = (path.sigma(t[0]) * path.s(t[0])).item() * noise.to(widest_float(noise.device))
    for i in range(steps):
        eps = S_noise * randn_like(x)                                   # Algorithm 2, line 4
        # Noise is added to x / s(t), as in the authors' code
        s_hat = path.s(t_hat[i])
        added = (path.sigma(t_hat[i]) ** 2 - sigmas[i] ** 2).clamp(min=0).sqrt()
        grown = s_hat / path.s(t[i])
        x_hat = grown.item() * x + (s_hat * added).item() * eps         # Algorithm 2, line 6
        d, denoised = path.dx_dt(D, x_hat, t_hat[i], y)                 # Algorithm 1, line 4
        h = (t[i + 1] - t_hat[i]).item()                                # Algorithm 3, line 4
        x = x_hat + h * d                                               # Algorithm 1, line 5
        if t[i + 1] != 0 and solver == "heun":                          # Algorithm 1, line 6
            x_prime = x_hat + alpha * h * d                             # Algorithm 3, line 6
            d_prime, _ = path.dx_dt(D, x_prime, t_prime[i], y)          # Algorithm 3, line 8
            half = 1 / (2 * alpha)
            x = x_hat + h * ((1 - half) * d + half * d_prime)           # Algorithm 3, line 9
        yield x.to(noise.dtype), denoised.to(noise.dtype)


def check_churn(S_churn, S_tmin, S_noise):
    if min(S_churn, S_tmin, S_noise) < 0:
        given = f"got {S_churn:g}, {S_tmin:g} and {S_noise:g}"
        raise ValueError(f"S_churn, S_tmin and S_noise must be 0 or more, {given}")


def check_times(path, t_hat, t_prime, alpha):
    """ValueError where churn or alpha leads to a time at which the path has no noise level."""
    if not path.sigma(t_hat).isfinite().all():
        raise ValueError(
            "S_churn would raise the noise above what the vp schedule reaches between this "
            "sigma_min and sigma_max: lower S_churn or sigma_min, or take another schedule"
        )
    t_prime = t_prime[:-1]  # the last step is Euler's
    if alpha <= 0 or (t_prime <= 0).any() or not (path.sigma(t_prime) > 0).all():
        raise ValueError(f"alpha {alpha:g} is 0 or less, or steps past noise level 0")


@torch.no_grad()
def ode_invert(D, x_0, y=None, *, steps=18, rho=3, sigma_min=None, sigma_max=None):
    """The unit-variance latent of images x_0, both (B, C, H, W); Sec. 4, App. D.1.

    From it `ode_sample` with the same steps and rho returns the images.
    """
    sigma_min, sigma_max = noise_range("edm", sigma_min, sigma_max, D)
    t = rounded(D, sigma_steps(steps, "edm", sigma_min, sigma_max, rho)).flip(0).tolist()
    x = x_0.to(widest_float(x_0.device))
    for i in range(steps - 1):
        h = t[i + 1] - t[i]
        d = (x - D(x, sigma_of_each(t[i], x), y)) / t[i]                # Eq. 1, Eq. 3
        x_next = x + h * d
        denoised = D(x_next, sigma_of_each(t[i + 1], x), y)
        d_prime = (x_next - denoised) / t[i + 1]                        # Eq. 1, Eq. 3
        x = x + h * (d + d_prime) / 2                                   # Algorithm 1, upwards
    return (x / t[-1]).to(x_0.dtype)


# Any method as a denoiser

def denoiser(method):
    """D(x, sigma, y), with sigma_min, sigma_max and round_sigma, of any method.

    It has a D of its own, or else `alpha_bar` and `predict` (Table 1, App. C.3).
    """
    return OwnDenoiser(method) if hasattr(method, "D") else StepDenoiser(method)


class OwnDenoiser:
    """D of a method that has one."""

    def __init__(self, method):
        self.D = method.D
        self.round_sigma = method.round_sigma
        self.sigma_min = method.sigma_min
        self.sigma_max = method.sigma_max

    def __call__(self, x, sigma, y=None):
        return self.D(x, sigma, y)


class StepDenoiser:
    """D of a network trained at steps t; it knows the noise levels of these; App. C.3."""

    def __init__(self, method):
        alpha_bar = method.alpha_bar[1:]
        self.method = method
        self.sigma = ((1 - alpha_bar) / alpha_bar).sqrt()               # (T,) App. C.3
        self.numbers = self.sigma.tolist()
        self.sigma_min = self.numbers[0]
        self.sigma_max = self.numbers[-1]

    def round_sigma(self, sigma):
        if torch.is_tensor(sigma):
            return self.sigma[nearest(self.sigma, sigma)]
        return min(self.numbers, key=lambda known: abs(known - sigma))

    def __call__(self, x, sigma, y=None):
        """x_0_hat (B, C, H, W), not clipped, in x's type, at the nearest known level."""
        t = 1 + nearest(self.sigma, sigma_of_each(sigma, x))            # (B, 1, 1, 1)
        x_t = self.method.alpha_bar[t].sqrt() * x                       # Table 1, iDDPM c_in
        x_t = x_t.to(type_of(self.method, x))
        return self.method.predict(x_t, t, y).to(x.dtype)


# Augmentation

def augment(x, p):
    """Images (B, C, H, W) warped at random, each transform with probability p; App. F.2.

    Also the labels (B, 9) that say what was done to each, all 0 for nothing; Table 6.
    """
    B, _, H, W = x.shape
    # Matrix products in bf16 would move the pixels of a large image by half of one
    with torch.autocast(x.device.type, enabled=False):
        labels, back, shift = draw_warp(B, p, x.device)
        back[:, 0, 1] *= H / W  # from pixels to units of half the image
        back[:, 1, 0] *= W / H
        theta = torch.cat([back, -back @ shift], dim=2)                 # (B, 2, 3)
        grid = nn.functional.affine_grid(theta, [B, 1, H, W], align_corners=False)
        warped = nn.functional.grid_sample(
            x, grid.to(x.dtype), padding_mode="reflection", align_corners=False
        )
    return warped, labels


def draw_warp(B, p, device):
    """Labels (B, 9); the matrix (B, 2, 2) from a warped pixel back to its source, in pixels;
    the shift (B, 2, 1), in units of half the image.
    """
    uniform = torch.rand(B, 12, device=device)
    normal = torch.randn(B, 4, device=device)
    on = (uniform[:, :6] < p).float()                                   # Table 6, enabled with
    flip_x = (uniform[:, 6] < 0.5).float()                              # Table 6, a_0
    flip_y = on[:, 1] * (uniform[:, 7] < 0.5)                           # Table 6, a_1
    octaves = on[:, 2] * normal[:, 0]                                   # Table 6, a_2
    angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)                # Table 6, a_3
    axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)                 # Table 6, a_4
    stretch = on[:, 4] * normal[:, 1]                                   # Table 6, a_5
    move_x = on[:, 5] * normal[:, 2]                                    # Table 6, a_6
    move_y = on[:, 5] * normal[:, 3]                                    # Table 6, a_7

    # The inverses of Table 6's transforms, the first one first
    back = scale(1 - 2 * flip_x, 1 - 2 * flip_y)
    back = back @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves))
    back = back @ rotation(angle)
    back = back @ rotation(axis)
    back = back @ scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch))
    back = back @ rotation(-axis)                                       # (B, 2, 2)
    shift = torch.stack([move_x, move_y], dim=1)[:, :, None] / 4  # W/8 is a quarter of W/2
    labels = [flip_x, flip_y, octaves, angle.cos() - 1, angle.sin()]
    labels += [stretch * axis.cos(), stretch * axis.sin(), move_x, move_y]
    return torch.stack(labels, dim=1), back, shift


def scale(a, b):
    """(B,) and (B,) -> (B, 2, 2)."""
    return torch.stack([a, b], dim=1).diag_embed()


def rotation(angle):
    """(B,) -> (B, 2, 2)."""
    rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return torch.stack(rows, dim=1).unflatten(1, (2, 2))


# Helpers

def nearest(levels, sigma):
    """Index of the level nearest to sigma, a number or a tensor, in the shape of sigma."""
    return (levels - torch.as_tensor(sigma).to(levels)[..., None]).abs().argmin(-1)


def sigma_of_each(sigma, x):
    """The noise level sigma, a number or a tensor, for each image of x: (B, 1, 1, 1)."""
    if torch.is_tensor(sigma) and sigma.ndim > 0:
        return sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
    return x.new_full((len(x), 1, 1, 1), float(sigma), dtype=widest_float(x.device))


def widest_float(device):
    """float64 where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def type_of(net, x):
    """The type that the network's weights have; x's for a network without any."""
    return next(net.parameters(), x).dtype


def check(what, value, options):
    if value not in options:
        raise ValueError(f"{what} must be one of {', '.join(options)}, got {value!r}")
