"""Patched diffusion models (PDM): Improving Diffusion Model Efficiency Through Patching.  Luhman & Luhman, 2022.
arXiv:2207.04316

An image is redundant, most of all under noise, where the best prediction is a blur. So fold every P x P pixels into
channels and let the network work on an H/P x W/P grid: about P^2 times less time and memory, in training and sampling.
A network of so few positions should predict the image (or v), not the noise. Notation as in iddpm.py, except

    paper           code                shape                meaning
    P               patch                                    patch size of each part; 1 is the plain U-Net
    cut             split_snr                                SNR at which the chain changes network (Sec. 4.1)
    alpha_t         alpha_bar[t]        (T + 1,)             this paper's alpha_t is DDPM's alpha_bar_t
    z_t, x          x_t, x_0            (B, C, H, W)         noisy and clean image
    SNR(t)          snr(t)              (B, 1, 1, 1)         alpha_bar_t / (1 - alpha_bar_t)
    v               out                 (B, C, H, W)         network's output, if v is its target; IDDPM's v is `var` here
    gamma_t         gamma(t)            (B, 1, 1, 1)         weight of the loss, always taken on x
    x_theta, x*     x_0_hat             (B, C, H, W)         the network's prediction; the optimal one is `posterior_mean`

This is not Patch Diffusion (Wang et al. 2023), which trains on crops. Where we differ from the authors' code: the order of
the channels in a patch; here the cosine schedule and a fixed variance are the defaults (theirs: linear, learned).
"""
from typing import Literal

import torch
from torch import nn

from ddpm import linear_betas
from iddpm import IDDPM


def patchify(x, P):
    """Fold P x P pixels into channels: (B, C, H, W) -> (B, C P^2, H/P, W/P)."""
    return nn.functional.pixel_unshuffle(x, P)


def unpatchify(x, P):
    """Undo patchify: (B, C P^2, H/P, W/P) -> (B, C, H, W)."""
    return nn.functional.pixel_shuffle(x, P)


def posterior_mean(x_t, alpha_bar, data):
    """E[x_0 | x_t] (B, C, H, W), the optimal prediction, if x_0 is one of data (N, C, H, W): a blur where x_t is noisy."""
    z, data = x_t.flatten(1).to(torch.float32 if x_t.device.type == "mps" else torch.float64), data.flatten(1).split(1000)
    alpha_bar, logits = torch.as_tensor(alpha_bar, dtype=z.dtype, device=z.device).reshape(-1, 1), []
    for x in data:                                                                                      # (n, C H W)
        distance = z.square().sum(1, keepdim=True) - 2 * alpha_bar.sqrt() * z @ x.to(z).T + alpha_bar * x.to(z).square().sum(1)  # Optimal prediction
        logits.append(-distance / (2 * (1 - alpha_bar)).clamp(min=1e-12))                              # (B, n)
    w = torch.cat(logits, dim=1).softmax(1).split(1000, dim=1)                                          # (B, N) in parts
    return sum(w_k @ x.to(z) for w_k, x in zip(w, data)).view_as(x_t).to(x_t.dtype)


class PDM(IDDPM):
    """IDDPM whose network sees patches as channels, with a choice of training target and loss weight."""
    guidance = 1.5                                                          # what sample.py takes where classes are used; Guidance
    def __init__(self, make_net, channels, *,
                 patch: tuple[int, ...] = 4,                         # P, patch size; 1 is the plain U-Net; one for each part, noisiest first
                 predict: Literal["x", "eps", "v"] = "x",            # what the network predicts
                 weight: Literal["1", "sqrt_snr", "snr", "snr+1", "truncated", "p2"] = "sqrt_snr",  # gamma_t, weight of the loss on x
                 T: int = 1000,                                      # number of diffusion steps
                 schedule: Literal["cosine", "linear", "linear0.025"] = "cosine",  # noise schedule; the paper's linear learns slowly
                 split_snr: tuple[float, ...] = (),                  # cuts: a network of its own for each part of the chain (Sec. 4.1)
                 part: int | None = None,                            # train this part alone, 0 the noisiest; experiments/join_parts.py joins
                 learn_variance: bool = False,                       # learn IDDPM's variance too; needs a long run
                 variance: Literal["large", "small"] = "large",      # sigma_t^2 where none is learned: beta_t or beta_tilde_t
                 clip: bool = True):                                 # clip x_0_hat to [-1, 1] in sampling
        parts, patch = len(split_snr) + 1, [patch] if isinstance(patch, int) else list(patch)
        patch = patch * parts if len(patch) == 1 else patch
        if len(patch) != parts or min(patch) < 1 or part is not None and not (split_snr and 0 <= part < parts):
            raise ValueError(f"split_snr makes {parts} parts, 0 the noisiest, and patch is one size from 1 on or one a part: got patch {patch}, part {part}")

        def make_parts(c_in, c_out):
            nets = [Patched(make_net(c_in * P ** 2, c_out * P ** 2), P) for P in patch]
            return Split(nets) if split_snr else nets[0]
        super().__init__(make_parts, channels, T=T, schedule="cosine" if schedule == "cosine" else "linear",
                         objective="hybrid" if learn_variance else "simple", variance=variance, clip=clip)
        if schedule == "linear0.025":
            self.set_schedule(linear_betas(T, beta_T=0.025))
        self.target, self.weight, self.part = predict, weight, part
        if split_snr:
            snr = self.snr(torch.arange(1, T + 1))
            part_of = (snr[:, None] > snr.new_tensor(split_snr)).sum(1)                         # Sec. 4.1: a cut belongs to the noisier part
            if len(part_of.unique()) != parts:
                raise ValueError(f"split_snr {split_snr} leaves a part without steps: SNR runs from {snr[-1]:.2g} to {snr[0]:.2g}")
            self.net.part_of = torch.cat([part_of[:1], part_of])                                        # (T + 1,)

    def draw_t(self, B, device):
        if self.part is None:
            return super().draw_t(B, device)
        own = 1 + (self.net.part_of[1:] == self.part).nonzero()                                         # (steps of the part, 1)
        return own[torch.randint(len(own), (B,), device=device)].view(B, 1, 1, 1), 1.0

    def snr(self, t):
        return self.alpha_bar[t] / (1 - self.alpha_bar[t])                                              # SNR(t)

    def gamma(self, t):
        """Weight of the loss on x, (B, 1, 1, 1) float64: sqrt(SNR) in the paper, the others in its code."""
        snr = self.snr(t)
        return {"1": torch.ones_like(snr), "sqrt_snr": snr.sqrt(), "snr": snr, "snr+1": snr + 1, "truncated": snr.clamp(min=1),
                "p2": snr * (1 - self.alpha_bar[t]).sqrt()}[self.weight]                                # Loss weight

    def x_0_and_v(self, x_t, t, y=None):
        """x_0_hat from any of the three targets, and IDDPM's v (or None)."""
        out, var = self.outputs(x_t, t, y)
        if self.target == "eps":
            out = self.x_0_hat(x_t, t, out)
        elif self.target == "v":
            out = self.alpha_bar[t].sqrt() * x_t - (1 - self.alpha_bar[t]).sqrt() * out                 # Training targets
        return out.to(x_t.dtype), var

    def loss(self, x_0, y=None):
        """gamma_t ||x - x_hat||^2 of images in [-1, 1], and lambda L_vlb where the variance is learned."""
        t, _ = self.draw_t(len(x_0), x_0.device)
        x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
        x_0_hat, var = self.x_0_and_v(x_t, t, y)
        L = (self.gamma(t).to(x_0.dtype) * (x_0 - x_0_hat).square()).flatten(1).mean(1)                 # Loss weight
        if self.learned:
            L = L + self.lambda_vlb * self.T * self.L_t(x_0, x_t, t, x_0_hat.detach(), var)             # IDDPM Eq. 16
        return L.mean()


class Split(nn.Module):
    """Networks that share the chain, the one for the noisiest steps first; each sees only its own; Sec. 4.1."""
    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.register_buffer("part_of", None, persistent=False)                 # (T + 1,), the part that step t belongs to

    def forward(self, x, c_noise, y=None):
        part, out = self.part_of[c_noise.long()], None                          # (B,)
        for k, net in enumerate(self.nets):
            mine = (part == k).nonzero().flatten()
            if len(mine) == len(x):
                return net(x, c_noise, y)
            if len(mine):
                own = net(x[mine], c_noise[mine], None if y is None else y[mine])
                out = (own.new_zeros(len(x), *own.shape[1:]) if out is None else out).index_copy(0, mine, own)
        return out                                                              # (B, C, H, W), or (B, 2C, H, W)


class Patched(nn.Module):
    """A network run on patches. Its C P^2 or 2C P^2 outputs unfold into C or 2C channels, mean before variance."""
    def __init__(self, net, P):
        super().__init__()
        self.net, self.P = net, P

    def forward(self, x, c_noise, y=None):                       # (B, C, H, W)
        x = self.net(patchify(x, self.P), c_noise, y)            # (B, C P^2, H/P, W/P), or twice the channels
        return unpatchify(x, self.P)                             # (B, C, H, W), or (B, 2C, H, W)
