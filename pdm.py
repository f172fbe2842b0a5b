"""Patched diffusion models (PDM): Improving Diffusion Model Efficiency Through Patching.  Luhman & Luhman, 2022.
arXiv:2207.04316

An image is redundant, most of all under noise, where the best prediction is a blur. So fold every P x P pixels into
channels and let the network work on an H/P x W/P grid: about P^2 times less time and memory, in training and sampling.
A network of so few positions should predict the image (or v), not the noise. Notation as in iddpm.py, except

    paper           code                shape                meaning
    P               patch                                    patch size; 1 is the plain U-Net
    alpha_t         alpha_bar[t]        (T + 1,)             this paper's alpha_t is DDPM's alpha_bar_t
    z_t, x          x_t, x_0            (B, C, H, W)         noisy and clean image
    SNR(t)          snr(t)              (B, 1, 1, 1)         alpha_bar_t / (1 - alpha_bar_t)
    v               out                 (B, C, H, W)         network's output, if v is its target; IDDPM's v is `var` here
    gamma_t         gamma(t)            (B, 1, 1, 1)         weight of the loss, always taken on x

This is not Patch Diffusion (Wang et al. 2023), which trains on crops. Where we differ from the authors' code: the order of
the channels in a patch; here the cosine schedule and a fixed variance are the defaults, see there.
"""
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ddpm import linear_betas
from iddpm import IDDPM


def patchify(x, P):
    """Fold P x P pixels into channels: (B, C, H, W) -> (B, C P^2, H/P, W/P)."""
    return F.pixel_unshuffle(x, P)


def unpatchify(x, P):
    """Undo patchify: (B, C P^2, H/P, W/P) -> (B, C, H, W)."""
    return F.pixel_shuffle(x, P)


def posterior_mean(x_t, alpha_bar, data):
    """E[x_0 | x_t] (B, C, H, W), the optimal prediction, if x_0 is one of data (N, C, H, W); alpha_bar a number or (B, 1, 1, 1).

    A mean of the data, blurry where x_t is noisy (Optimal prediction). float64 where the device has it, as distances cancel.
    """
    z = x_t.flatten(1).to(torch.float32 if x_t.device.type == "mps" else torch.float64)                 # (B, C H W)
    alpha_bar = torch.as_tensor(alpha_bar, dtype=z.dtype, device=z.device).reshape(-1, 1)
    logits = []
    for x in data.flatten(1).split(1000):                                                               # (n, C H W)
        x = x.to(z)
        square = z.square().sum(1, keepdim=True) - 2 * alpha_bar.sqrt() * z @ x.T + alpha_bar * x.square().sum(1)
        logits.append(-square / (2 * (1 - alpha_bar)))                                                  # (B, n)
    w = torch.cat(logits, dim=1).softmax(1)                                                             # (B, N)
    x = sum(w_k @ x.to(z) for w_k, x in zip(w.split(1000, dim=1), data.flatten(1).split(1000)))
    return x.view_as(x_t).to(x_t.dtype)


class PDM(IDDPM):
    """IDDPM whose network sees patches as channels, with a choice of training target and loss weight."""

    def __init__(self, make_net, channels, *,
                 patch: int = 4,                                     # P, patch size; 1 is the plain U-Net
                 predict: Literal["x", "eps", "v"] = "x",            # what the network predicts
                 weight: Literal["1", "sqrt_snr", "snr", "snr+1", "truncated", "p2"] = "sqrt_snr",  # gamma_t, weight of the loss on x
                 T: int = 1000,                                      # number of diffusion steps
                 schedule: Literal["cosine", "linear", "linear0.025"] = "cosine",  # noise schedule; the paper's linear learns slowly
                 learn_variance: bool = False,                       # learn IDDPM's variance too; needs a long run
                 variance: Literal["large", "small"] = "large",      # sigma_t^2 where none is learned: beta_t or beta_tilde_t
                 clip: bool = True):                                 # clip x_0_hat to [-1, 1] in sampling
        if patch < 1:
            raise ValueError(f"patch must be 1 or more, got {patch}")
        super().__init__(lambda c_in, c_out: Patched(make_net(c_in * patch ** 2, c_out * patch ** 2), patch), channels,
                         T=T, schedule="cosine" if schedule == "cosine" else "linear",
                         objective="hybrid" if learn_variance else "simple", variance=variance, clip=clip)
        if schedule == "linear0.025":
            self.set_schedule(linear_betas(T, beta_T=0.025))
        self.target, self.weight = predict, weight

    def snr(self, t):
        return self.alpha_bar[t] / (1 - self.alpha_bar[t])

    def gamma(self, t):
        """Weight of the loss on x, (B, 1, 1, 1) float64: sqrt(SNR) in the paper, the others in its code."""
        snr = self.snr(t)
        return {"1": torch.ones_like(snr), "sqrt_snr": snr.sqrt(), "snr": snr, "snr+1": snr + 1, "truncated": snr.clamp(min=1),
                "p2": snr * (1 - self.alpha_bar[t]).sqrt()}[self.weight]

    def x_0_and_v(self, x_t, t, y=None):
        """x_0_hat from any of the three targets, and IDDPM's v (or None)."""
        out, var = self.outputs(x_t, t, y)
        alpha_bar = self.alpha_bar[t]
        if self.target == "x":
            x_0_hat = out
        elif self.target == "eps":
            x_0_hat = self.x_0_hat(x_t, t, out)
        else:
            x_0_hat = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * out
        return x_0_hat.to(x_t.dtype), var

    def loss(self, x_0, y=None):
        """gamma_t ||x - x_hat||^2 of images in [-1, 1], and lambda L_vlb where the variance is learned."""
        t, _ = self.draw_t(len(x_0), x_0.device)
        x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
        x_0_hat, var = self.x_0_and_v(x_t, t, y)
        L = (self.gamma(t).to(x_0.dtype) * (x_0 - x_0_hat).square()).flatten(1).mean(1)
        if self.learned:
            L = L + self.lambda_vlb * self.T * self.L_t(x_0, x_t, t, x_0_hat.detach(), var)             # IDDPM Eq. 16
        return L.mean()


class Patched(nn.Module):
    """A network run on patches. Its C P^2 or 2C P^2 outputs unfold into C or 2C channels, mean before variance."""

    def __init__(self, net, P):
        super().__init__()
        self.net, self.P = net, P

    def forward(self, x, c_noise, y=None):                       # (B, C, H, W)
        x = patchify(x, self.P)                                  # (B, C P^2, H/P, W/P)
        x = self.net(x, c_noise, y)                              # (B, C P^2, H/P, W/P), or twice the channels
        return unpatchify(x, self.P)                             # (B, C, H, W), or (B, 2C, H, W)
