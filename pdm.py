"""Patched diffusion models (PDM): Improving Diffusion Model Efficiency Through Patching.
Luhman & Luhman, 2022.  arXiv:2207.04316

An image is redundant, most of all under noise, where the best prediction is a blur. So fold
every P x P pixels into channels and let the network work on an H/P x W/P grid: about P^2 times
less time and memory, in training and sampling. A network of so few positions should predict the
image (or v), not the noise. Notation as in iddpm.py, except

    paper          code             shape          meaning
    P              patch                           patch size; one for each part of the chain
    cut            split_snr                       SNR at which the chain changes network
    alpha_t        alpha_bar[t]     (T + 1,)       this paper's alpha_t is DDPM's alpha_bar_t
    z_t, x         x_t, x_0         (B, C, H, W)   noisy and clean image
    SNR(t)         snr(t)           (B, 1, 1, 1)   alpha_bar_t / (1 - alpha_bar_t)
    x, eps or v    out              (B, C, H, W)   the network's output, by its target
    v of IDDPM     var              (B, C, H, W)   the other half, where the variance is learned
    gamma_t        gamma(t)         (B, 1, 1, 1)   weight of the loss, which is taken on x
    x_theta        x_0_hat          (B, C, H, W)   the prediction of x
    x*             posterior_mean   (B, C, H, W)   the optimal prediction of x

This is not Patch Diffusion (Wang et al. 2023), which trains on crops. Tags without a number
name sections of the paper.
Where we differ from the authors' code: the order of the channels in a patch; parts are counted
from the noisiest, theirs from the cleanest; the cosine schedule and a fixed variance are our
defaults (theirs: linear, learned). Their variance head has two layers, reads detached features,
and in its v 1 means beta_tilde; they weigh the bound with 1, which is our lambda T at T = 1000
only. They add a position embedding to the patch grid, and clip guided samples by `dynamic_clip`
(dynamic thresholding, of Imagen).
"""
import math
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ddpm import linear_betas
from iddpm import IDDPM, cosine_betas


def patchify(x, P):
    """Fold P x P pixels into channels: (B, C, H, W) -> (B, C P^2, H/P, W/P)."""
    return pixel_unshuffle(x, P)


def unpatchify(x, P):
    """Undo patchify: (B, C P^2, H/P, W/P) -> (B, C, H, W)."""
    return pixel_shuffle(x, P)


class Patched(nn.Module):
    """A network run on patches; what it gives unfolds into C channels, or into 2C.

    pixel_shuffle keeps each channel's P^2 numbers together, so the mean stays the first half.
    """

    def __init__(self, net, P):
        super().__init__()
        self.net = net
        self.P = P

    def forward(self, x, c_noise, y=None):
        x = patchify(x, self.P)                                         # (B, C P^2, H/P, W/P)
        x = self.net(x, c_noise, y)                                     # the same, or 2C P^2
        return unpatchify(x, self.P)                                    # (B, C or 2C, H, W)


def posterior_mean(x_t, alpha_bar, data):
    """E[x_0 | x_t] (B, C, H, W), the optimal prediction, if x_0 is one of data (N, C, H, W).

    alpha_bar is a number or (B, 1, 1, 1). A blur of the data where x_t is noisy.
    """
    precise = torch.float32 if x_t.device.type == "mps" else torch.float64
    z = x_t.flatten(1).to(precise)                                      # (B, C H W)
    z_z = z.square().sum(1, keepdim=True)                               # (B, 1)
    alpha_bar = torch.as_tensor(alpha_bar, dtype=precise, device=z.device).reshape(-1, 1)
    variance = (1 - alpha_bar).clamp(min=5e-13)  # where alpha_bar = 1, the nearest image
    parts = data.flatten(1).split(1000)                                 # (1000, C H W) or fewer
    logits = []
    for part in parts:
        x = part.to(z)
        product = alpha_bar.sqrt() * z @ x.T                            # (B, 1000)
        distance = z_z - 2 * product + alpha_bar * x.square().sum(1)    # Optimal prediction
        logits.append(-distance / (2 * variance))                       # Optimal prediction
    w = torch.cat(logits, dim=1).softmax(1)                             # Optimal prediction
    x_star = torch.zeros_like(z)
    for part, w_part in zip(parts, w.split(1000, dim=1)):
        x_star += w_part @ part.to(z)                                   # Optimal prediction
    return x_star.view_as(x_t).to(x_t.dtype)


Weight = Literal["1", "sqrt_snr", "snr", "snr+1", "truncated", "p2"]


class PDM(IDDPM):
    """IDDPM whose network sees patches as channels, with a choice of target and loss weight."""

    guidance = 1.5  # the paper's weight of guidance, where there are classes
    latent_config = {"clip": False, "learn_variance": False}

    def __init__(
        self,
        make_net,
        channels,
        *,
        patch: tuple[int, ...] = (4,),  # P, one size, or one for each part, noisiest first
        predict: Literal["x", "eps", "v"] = "x",  # what the network predicts
        weight: Weight = "sqrt_snr",  # gamma_t, weight of the loss on x
        T: int = 1000,  # number of diffusion steps
        schedule: Literal["cosine", "linear", "linear0.025"] = "cosine",  # of the noise
        split_snr: tuple[float, ...] = (),  # cuts: a network for each part (Sec. 4.1)
        learn_variance: bool = False,  # learn IDDPM's variance too; needs a long run
        variance: Literal["large", "small"] = "large",  # if not learned: beta_t or beta_tilde_t
        clip: bool = True,  # clip x_0_hat to [-1, 1] in sampling
        dynamic_clip: bool = False,  # clip at each image's .995 quantile instead, and divide
    ):
        patch = patch_of_each_part(patch, len(split_snr) + 1)
        betas = betas_of(schedule, T)
        part_of = parts_of_steps(betas, split_snr)                      # (T + 1,)

        def make_patched(c_in, c_out):  # c_out is 2C where the variance is learned
            nets = [Patched(make_net(c_in * P**2, c_out * P**2), P) for P in patch]
            return Split(nets, part_of) if split_snr else nets[0]

        super().__init__(
            make_patched,
            channels,
            T=T,
            objective="hybrid" if learn_variance else "simple",
            variance=variance,
            clip=clip,
            betas=betas,
        )
        self.target = predict
        self.weight = weight
        self.dynamic_clip = dynamic_clip
        self.size_multiple = math.lcm(*patch)  # must divide H and W, besides the U-Net's depth

    # Training targets

    def training_target(self, x_0, eps, t):
        """What the network should say, (B, C, H, W), by `predict`; x_from_target undoes it.

        The loss is taken on x, and needs the way back only.
        """
        alpha_bar = self.alpha_bar[t]
        if self.target == "x":
            return x_0                                                  # Training targets, x
        if self.target == "eps":
            return eps                                                  # Training targets, eps
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0       # Training targets, v
        return v.to(x_0.dtype)

    def x_from_target(self, x_t, t, out):
        """The x (B, C, H, W) of which `out` is the target at x_t."""
        alpha_bar = self.alpha_bar[t]
        if self.target == "x":
            return out.to(x_t.dtype)
        if self.target == "eps":
            return self.x_0_hat(x_t, t, out)                            # DDPM Eq. 15
        x = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * out       # Training targets, v
        return x.to(x_t.dtype)

    def x_0_and_v(self, x_t, t, y=None):
        """x_0_hat (B, C, H, W), not clipped, and IDDPM's v, or None where none is learned."""
        out, var = self.outputs(x_t, t, y)
        if self.learned:
            var = var.tanh()  # the authors' sigmoid; free, it runs away in a short run
        return self.x_from_target(x_t, t, out), var

    def clip_if_asked(self, x_0_hat):
        """As DDPM's; or by each image's own s, the .995 quantile of |x_0_hat|, if above 1."""
        if not self.dynamic_clip:
            return super().clip_if_asked(x_0_hat)
        rising, _ = x_0_hat.abs().flatten(1).sort(dim=1)                # (B, C H W)
        s = rising[:, round(0.995 * (rising.shape[1] - 1))]             # (B,)
        s = s.clamp(min=1).view(-1, 1, 1, 1)
        return x_0_hat.clamp(-s, s) / s

    # Loss

    def snr(self, t):
        return self.alpha_bar[t] / (1 - self.alpha_bar[t])              # SNR(t)

    def gamma(self, t):
        """Weight of the loss on x, float64; the paper's own choice is sqrt(SNR)."""
        snr = self.snr(t)
        weights = {
            "1": torch.ones_like(snr),
            "sqrt_snr": snr.sqrt(),                                     # Loss weight
            "snr": snr,  # that of the error in eps
            "snr+1": snr + 1,  # that of the error in v
            "truncated": snr.clamp(min=1),
            "p2": snr * (1 - self.alpha_bar[t]).sqrt(),
        }
        return weights[self.weight]

    def loss(self, x_0, y=None):
        """gamma_t ||x - x_0_hat||^2 of images in [-1, 1]; with lambda L_vlb, if that learns."""
        t = self.draw_t(x_0)
        x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
        x_0_hat, var = self.x_0_and_v(x_t, t, y)
        error = self.gamma(t) * (x_0 - x_0_hat).square()                # Loss weight
        loss = error.flatten(1).mean(1).to(x_0.dtype)                   # (B,)
        if self.learned:
            L_t = self.L_t(x_0, x_t, t, x_0_hat.detach(), var)
            loss = loss + self.lambda_vlb * self.T * L_t                # IDDPM Eq. 16
        return loss.mean()


def betas_of(schedule, T):
    if schedule == "cosine":
        return cosine_betas(T)
    return linear_betas(T, beta_T=0.025 if schedule == "linear0.025" else 0.02)


# Splitting

class Split(nn.Module):
    """Networks that share the chain, that of the noisiest steps first; Sec. 4.1.

    part_of (T + 1,) says which network serves step t; each gets only the images of its steps.
    """

    def __init__(self, nets, part_of):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.register_buffer("part_of", part_of, persistent=False)

    def forward(self, x, c_noise, y=None):
        part = self.part_of[c_noise.long()]                             # (B,), c_noise is t
        out = None
        for k, net in enumerate(self.nets):
            rows = (part == k).nonzero().flatten()                      # (B_k,)
            if len(rows) == 0:
                continue
            y_k = None if y is None else y[rows]
            out_k = net(x[rows], c_noise[rows], y_k)                    # (B_k, C or 2C, H, W)
            if out is None:
                out = out_k.new_zeros(len(x), *out_k.shape[1:])
            out = out.index_copy(0, rows, out_k)
        return out                                                      # (B, C or 2C, H, W)


def parts_of_steps(betas, cuts):
    """The part, 0 the noisiest, that each step t = 0..T belongs to, (T + 1,); Sec. 4.1.

    A cut in SNR belongs to the noisier part. ValueError where a part has no steps.
    """
    alpha_bar = (1 - betas).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)                                   # (T,)
    part_of = (snr[:, None] > snr.new_tensor(cuts)).sum(1)              # Sec. 4.1
    if len(part_of.unique()) != len(cuts) + 1:
        raise ValueError(
            f"split_snr {cuts} leaves a part without steps: "
            f"SNR runs from {snr[-1]:.2g} to {snr[0]:.2g}"
        )
    return torch.cat([part_of[:1], part_of])  # t = 0 goes with t = 1


def patch_of_each_part(patch, parts):
    """A patch size for each part: the given ones, or the one (also a number) given for all."""
    patch = [patch] if isinstance(patch, int) else list(patch)
    if len(patch) == 1:
        patch = patch * parts
    if len(patch) != parts or min(patch) < 1:
        raise ValueError(
            f"patch is a size from 1 on, or one for each of the {parts} parts that split_snr "
            f"makes, the noisiest first: got {patch}"
        )
    return patch
