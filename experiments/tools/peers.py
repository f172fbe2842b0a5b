"""What people use instead: other projects' networks of about the same size, and their losses.

    pip install denoising-diffusion-pytorch diffusers
"""
import importlib.util
import math

import torch
from torch import nn
from torch.nn import functional as F

from plumbing.flags import UserError

PEERS = {
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
    "diffusers": "diffusers",
}


def check_peers():
    if not all(importlib.util.find_spec(module) for module in PEERS.values()):
        raise UserError(f"--peers needs pip install {' '.join(PEERS)}")


class Peer(nn.Module):
    """Another project's network as one of ours, in which a step t is a number."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, c_noise, y=None):
        out = self.net(x, c_noise)
        return getattr(out, "sample", out)


def peer_net(name, size, width, mults):
    """The network of the project `name`, with our widths and one block a level."""
    if name == "diffusers":
        return diffusers_net(size, width, mults)
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=width, dim_mults=tuple(int(m) for m in mults))


def diffusers_net(size, width, mults):
    from diffusers import UNet2DModel

    channels = tuple(int(width * m) for m in mults)
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=["DownBlock2D"] * len(channels),
        up_block_types=["UpBlock2D"] * len(channels),
        norm_num_groups=math.gcd(16, *channels),
    )


def peer_loss(name, net, size):
    """The project's own loss of images (B, 3, size, size) in [-1, 1], as a module."""
    if name == "diffusers":
        return DiffusersLoss(net)
    from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(net, image_size=size, timesteps=1000, auto_normalize=False)


class DiffusersLoss(nn.Module):
    """The loss as that project's examples of training write it."""

    def __init__(self, net):
        super().__init__()
        from diffusers import DDPMScheduler

        self.net = net
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)

    def forward(self, x):
        eps = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        noisy = self.scheduler.add_noise(x, eps, t)
        return F.mse_loss(self.net(noisy, t).sample, eps)
