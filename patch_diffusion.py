"""Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models.
Wang et al., 2023.  arXiv:2304.12526

EDM trained on random crops of random size, where two more input channels say where in the image
each pixel lies. Crops are cheaper than images, and there are more of them. That is training
only: a sample is drawn whole, from the coordinates of the whole image, by EDM's sampler. A
network that has seen one size of crop alone learns patches, and shows their borders, so sizes
are mixed; the large ones teach how far regions belong together. Notation as in edm.py, and

    paper   code     shape          meaning
    R       R                       image size, the smaller side where it is not square
    s       s                       crop size: R, R/2 or R/4; R/s times as many images a step
    p       p_full                  share of the steps that see whole images
    x~      crop     (B, C, h, w)   window of the image, its corner (i, j) anywhere
    u(k)    coords   (B, 2, h, w)   where each pixel lies in the image: x, then y, in [-1, 1]
            planes   (B, 2, h, w)   coords as EDM's D takes them: without noise, scale or loss

This is not PDM (Luhman 2022), which folds pixels into channels. EDM's augmentation is off: its
labels would have to move with the crop.
Where we differ from the authors' code: R/s times as many images at size s for every R (their
table lacks crops of 4 and 8 and R = 28, 32, 48 and 96; it has 4 and 8 times for halves and
quarters at R = 128, and 8 for quarters at R = 256); EDM's 18 steps, theirs 50; the loss is a
mean over pixels, so that all sizes weigh alike, theirs a sum, in which a quarter crop weighs
1/16 of an image.
"""
import math
from functools import lru_cache
from typing import Literal

import torch

from edm import EDM


def coordinates(H, W, image=(), corner=(0, 0)):
    """(2, H, W): x (columns), then y (rows), -1 and 1 at the corners of the image; Sec. 3.3.

    The H x W pixels begin at `corner` (y, x) of an image as large, or of size `image` (H, W).
    """
    R_y, R_x = image or (H, W)
    row = corner[0] + torch.arange(H)
    column = corner[1] + torch.arange(W)
    u_x = 2 * column / max(1, R_x - 1) - 1                              # Sec. 3.3
    u_y = 2 * row / max(1, R_y - 1) - 1                                 # Sec. 3.3
    return torch.stack([u_x.expand(H, W), u_y[:, None].expand(H, W)])


def random_crop(x, s):
    """A window of size s (or height and width) of each image, anywhere, not resized; Sec. 3.1.

    Crops (B, C, s, s) of images x (B, C, H, W), and coordinates (B, 2, s, s). ValueError where
    it does not fit.
    """
    B, C, H, W = x.shape
    h, w = s if isinstance(s, tuple) else (s, s)
    if not (1 <= h <= H and 1 <= w <= W):
        raise ValueError(f"a crop of {h}x{w} does not fit in an image of {H}x{W}")
    device = x.device
    grid = grid_on(H, W, device).to(x.dtype).expand(B, -1, -1, -1)
    both = torch.cat([x, grid], dim=1)                                  # (B, C + 2, H, W)
    i = torch.randint(H - h + 1, (B, 1, 1, 1), device=device)           # Sec. 3.2
    j = torch.randint(W - w + 1, (B, 1, 1, 1), device=device)           # Sec. 3.2
    image = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(C + 2, device=device).view(1, C + 2, 1, 1)
    row = i + torch.arange(h, device=device).view(1, 1, h, 1)           # (B, 1, h, 1)
    column = j + torch.arange(w, device=device).view(1, 1, 1, w)        # (B, 1, 1, w)
    both = both[image, channel, row, column]                            # (B, C + 2, h, w)
    return both[:, :C], both[:, C:]


@lru_cache(maxsize=32)
def grid_on(H, W, device):
    """`coordinates` of a whole image, made once for a size and a device."""
    return coordinates(H, W).to(device)


def patch_sizes(R, p, quarter=True):
    """{size: share of the steps} for images of size R, largest first; Eq. 5.

    Without quarter crops, as the authors' code has it for latents, {R: p, R/2: 1 - p}.
    ValueError for an R that 4, or 2, does not divide.
    """
    parts = 4 if quarter else 2
    if R % parts and p < 1:
        raise ValueError(f"crops of R/{parts} need an image size divisible by {parts}, got {R}")
    if not quarter:
        return {R: p, R // 2: 1 - p}
    return {R: p, R // 2: 3 / 5 * (1 - p), R // 4: 2 / 5 * (1 - p)}     # Eq. 5


def progressive_size(R, p, progress, quarter=True):
    """The crop size at `progress` in [0, 1]: small to large, each for its share; Sec. 3.2."""
    until = 0
    for size, share in sorted(patch_sizes(R, p, quarter).items()):
        until += share                                                  # Sec. 3.2
        if progress < until:
            return size
    return R


class PatchDiffusion(EDM):
    """EDM on crops that are told where they lie."""

    guidance = 1.3  # the paper's weight of guidance, where there are classes
    latent_config = {"quarter": False}

    def __init__(
        self,
        make_net,
        channels,
        *,
        p_full: float = 0.5,  # p, share of the steps that see whole images (Sec. 3.2)
        sizes: Literal["stochastic", "progressive"] = "stochastic",  # at random, or small first
        quarter: bool = True,  # crops of R/4 beside those of R/2; latents do without
        sigma_data: float = 0.5,  # standard deviation of the training images (EDM Table 1)
        P_mean: float = -1.2,  # mean of ln(sigma) in training (EDM Table 1)
        P_std: float = 1.2,  # standard deviation of ln(sigma) in training (EDM Table 1)
    ):
        def make_positioned(c_in, c_out):
            return make_net(c_in + 2, c_out)                            # Sec. 3.3

        super().__init__(
            make_positioned, channels, sigma_data=sigma_data, P_mean=P_mean, P_std=P_std
        )
        self.p_full = p_full
        self.sizes = sizes
        self.quarter = quarter
        parts = 4 if quarter else 2
        self.size_multiple = parts if p_full < 1 else 1  # must divide H and W, besides depth

    # Training

    def draw_size(self, R, progress):
        """The crop size s of the next step, which wants R/s times as many images; Sec. 3.2.

        progress in [0, 1] is that of the run.
        """
        if self.sizes == "progressive":
            return progressive_size(R, self.p_full, progress, self.quarter)
        shares = patch_sizes(R, self.p_full, self.quarter)
        k = torch.tensor(list(shares.values())).multinomial(1).item()
        return list(shares)[k]                                          # Sec. 3.2

    def loss(self, x, y=None, s=None):
        """EDM's loss on a crop of each image in [-1, 1], of size s, by default a drawn one."""
        H, W = x.shape[2:]
        R = min(H, W)
        if s is None:
            s = self.draw_size(R, progress=torch.rand(()).item())
        crop, coords = random_crop(x, (H * s // R, W * s // R))         # Sec. 3.1
        return self.weighted_error(crop, y, planes=coords)

    def sampling_planes(self, x):
        """The coordinates of a whole image, (B, 2, H, W), which D takes by default."""
        grid = grid_on(*x.shape[2:], x.device)
        return grid.expand(len(x), -1, -1, -1)                          # Sec. 3.3

    # Sampling

    def sample(
        self,
        noise,
        y=None,
        *,
        steps: int = 18,  # N, time steps; the network is evaluated 2N - 1 times
        corner: tuple[int, ...] = (0, 0),  # y x of the first pixel in the image
        image: tuple[int, ...] = (),  # h w of the whole image; default the canvas
        S_churn: float = 0.0,  # fresh noise; 0 is deterministic (EDM Table 5)
        S_tmin: float = 0.0,  # churn from this noise level (EDM Table 5)
        S_tmax: float = math.inf,  # churn up to this noise level (EDM Table 5)
        S_noise: float = 1.0,  # inflation of the fresh noise (EDM Table 5)
        sigma_min: float | None = None,  # lowest noise level; default 0.002
        sigma_max: float | None = None,  # highest noise level; default 80
        rho: float = 7.0,  # larger spends more of the steps near sigma_min (EDM Eq. 5)
        randn_like=torch.randn_like,
    ):
        """EDM's sampler on a canvas of the noise's size, whose first pixel lies at `corner`.

        The image is as large as the canvas, or of size `image`: then the canvas is a window of
        it, or goes on past it. ValueError for options that cannot be.
        """
        if len(corner) != 2 or len(image) not in (0, 2) or min(image, default=1) < 1:
            raise ValueError(f"corner takes y x and image h w, got {corner} and {image}")
        grid = coordinates(*noise.shape[2:], image, corner).to(noise.device)
        yield from super().sample(
            noise,
            y,
            steps=steps,
            S_churn=S_churn,
            S_tmin=S_tmin,
            S_tmax=S_tmax,
            S_noise=S_noise,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            randn_like=randn_like,
            planes=grid.expand(len(noise), -1, -1, -1),
        )
