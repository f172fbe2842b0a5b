"""Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models.  Wang et al., 2023.  arXiv:2304.12526

EDM trained on random crops of random size, where two more input channels say where in the image each pixel lies. Crops are
cheaper than images, and there are more of them. That is training only: a sample is drawn whole, from the coordinates of the
whole image, by EDM's sampler. A network that has seen one size of crop alone makes pictures of that coherence, so sizes are
mixed; the large ones teach how far regions belong together. Notation as in edm.py, and

    paper           code              shape            meaning
    R               R                                  image size, the smaller side where it is not square
    s               size                               crop size: R, R/2 or R/4; R/s times as many images a step
    p               p_full                             share of the steps that see whole images
    x~              crop              (B, C, h, w)     the window of the image, its corner (i, j) drawn evenly
    u(k)            coords            (B, 2, h, w)     where each pixel lies, x then y, in [-1, 1] of the whole image

This is not PDM (Luhman 2022), which folds pixels into channels. Where we differ from the authors' code: R/s times as many
images at size s for every R (their table lacks 28, 32, 48 and 96); EDM's 18 steps, theirs 50; the loss is a mean over pixels,
so that all sizes weigh alike, theirs a sum, in which a quarter crop weighs 1/16 of an image.
"""
from typing import Literal

import torch
from torch import nn

from edm import EDM


class PatchDiffusion(EDM):
    """EDM on crops that are told where they lie."""
    guidance = 1.3                           # what sample.py takes where classes are used

    def __init__(self, make_net, channels, *,
                 p_full: float = 0.5,        # p, share of the steps that see whole images (Eq. 5); 1 is EDM with coordinates
                 sizes: Literal["stochastic", "progressive"] = "stochastic",  # crop sizes at random, or small to large (Sec. 3.2)
                 quarter: bool = True,       # crops of R/4 beside those of R/2; latents do without
                 sigma_data: float = 0.5,    # standard deviation of the training images (EDM Table 1)
                 P_mean: float = -1.2,       # mean of ln(sigma) in training; -1.2 in EDM's Table 1
                 P_std: float = 1.2):        # standard deviation of ln(sigma) in training (EDM Table 1)
        super().__init__(lambda c_in, c_out: Positioned(make_net(c_in + 2, c_out)), channels, sigma_data=sigma_data, P_mean=P_mean, P_std=P_std)
        self.p_full, self.sizes, self.quarter = p_full, sizes, quarter

    def draw_size(self, R, progress):
        """The crop size of the next step, which wants R / size times as many images; progress in [0, 1] is that of the run."""
        if self.sizes == "progressive":
            return progressive_size(R, self.p_full, progress, self.quarter)
        probability = patch_sizes(R, self.p_full, self.quarter)
        return list(probability)[torch.tensor(list(probability.values())).multinomial(1)]

    def loss(self, x, y=None, size=None):
        """EDM's loss on a crop of each image in [-1, 1], of this size, by default drawn; Sec. 3.1."""
        R = min(x.shape[2:])
        size = size or self.draw_size(R, torch.rand(()).item())
        crop, coords = random_crop(x, tuple(n * size // R for n in x.shape[2:]))
        return super().loss(crop, (y, coords))


class Positioned(nn.Module):
    """A network that is told where its pixels lie; Sec. 3.3. Set `coords` (2, h, w) to sample a part of the image, or more."""
    def __init__(self, net):
        super().__init__()
        self.net, self.coords = net, None

    def forward(self, x, c_noise, y=None):                                          # (B, C, H, W)
        y, coords = y if isinstance(y, tuple) else (y, coordinates(*x.shape[2:]) if self.coords is None else self.coords)
        x = torch.cat([x, coords.to(x).expand(len(x), -1, -1, -1)], dim=1)          # (B, C + 2, H, W)
        return self.net(x, c_noise, y)                                              # (B, C, H, W)


def coordinates(H, W, image=None):
    """(2, H, W): x (columns), then y (rows), -1 and 1 at the corners of an image of that size, or of the size `image` (H, W); Sec. 3.3."""
    R_y, R_x = image or (H, W)
    x = 2 * torch.arange(W) / max(1, R_x - 1) - 1                                                       # Sec. 3.3
    y = 2 * torch.arange(H) / max(1, R_y - 1) - 1                                                       # Sec. 3.3
    return torch.stack([x.expand(H, W), y[:, None].expand(H, W)])


def random_crop(x, s):
    """A window of size s (or height and width) of each image, anywhere: crops (B, C, s, s), coordinates (B, 2, s, s); Sec. 3.1. ValueError where it does not fit."""
    B, C, H, W = x.shape
    h, w = s if isinstance(s, tuple) else (s, s)
    if not (1 <= h <= H and 1 <= w <= W):
        raise ValueError(f"a crop of {h}x{w} does not fit in an image of {H}x{W}")
    i = torch.randint(H - h + 1, (B, 1, 1, 1), device=x.device) + torch.arange(h, device=x.device)[:, None]
    j = torch.randint(W - w + 1, (B, 1, 1, 1), device=x.device) + torch.arange(w, device=x.device)
    b, c = torch.arange(B, device=x.device)[:, None, None, None], torch.arange(C + 2, device=x.device)[:, None, None]
    both = torch.cat([x, coordinates(H, W).to(x).expand(B, -1, -1, -1)], dim=1)[b, c, i, j]             # Sec. 3.1
    return both[:, :C], both[:, C:]


def patch_sizes(R, p, quarter=True):
    """{size: share of the steps} for images of size R; without quarter, {R, R/2} as for latents; Eq. 5."""
    parts = 4 if quarter else 2
    if R % parts and p < 1:
        raise ValueError(f"crops of R/2{' and R/4' if quarter else ''} need an image size divisible by {parts}, got {R}")
    return {R: p, R // 2: 3 / 5 * (1 - p), R // 4: 2 / 5 * (1 - p)} if quarter else {R: p, R // 2: 1 - p}  # Eq. 5


def progressive_size(R, p, progress, quarter=True):
    """The crop size at `progress` in [0, 1] of the run: small to large, each for its share; Sec. 3.2."""
    until = 0
    for size, share in sorted(patch_sizes(R, p, quarter).items()):
        until += share                                                                                  # Sec. 3.2
        if progress < until:
            return size
    return R
