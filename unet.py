"""The small U-Net that all five papers share, of the blocks of Improved DDPM (App. A).

    code       shape          meaning
    x          (B, C, H, W)   noisy image, or its patches folded into channels
    c_noise    (B,)           noise level in the method's terms: t, ln(sigma)/4, ...; float32
    y          (B,)           class indices; None, or -1 for one image, means "no class"
    emb        (B, 4 width)   what every block is told of c_noise and y

A level is one grid size. On the way down each block's output is kept; on the way up the block
across reads it again:

    x -+- conv -- [block] ----------------------- [block] -- conv -- scale -+- F(x; c_noise, y)
       |             halve -- [block] ----------- [block] -- double         |
       |                halve -- [block] [middle] [block] -- double         |
       +------------------------ 1x1 conv -------------------------- gate --+

The straight path is ours: where the answer is nearly the input (x_0 at low noise, eps at high)
no block has to copy it. Gate and scale know the noise: they say how much each path counts.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """F(x; c_noise, y): (B, in_channels, H, W) -> (B, out_channels, H, W), 0 before training.

    H and W are any sizes that 2^(levels - 1) divides; others raise ValueError.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        width: int = 64,  # channels at level 0, the finest grid
        mults: tuple[float, ...] = (1, 2),  # channels of each level, in units of width
        blocks: int = 1,  # residual blocks at each level, on each side
        attention: tuple[int, ...] = (),  # levels with self-attention; 0 is the finest grid
        dropout: float = 0.0,  # dropout inside the blocks
        classes=0,
    ):
        super().__init__()
        channels = [int(width * m) for m in mults]
        levels = len(channels)
        c_emb = 4 * width
        self.embed = nn.Sequential(
            Sinusoid(width),
            nn.Linear(width // 2 * 2, c_emb),
            nn.SiLU(),
            nn.Linear(c_emb, c_emb),
        )
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None  # row 0: no class

        def block(c_in, c_out, level):
            return Block(c_in, c_out, c_emb, dropout, level in attention)

        # Down: the first block of a level gives it its width
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        c = channels[0]
        for level in range(levels):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(block(c, channels[level], level))
                c = channels[level]
            self.down.append(stage)
        self.middle = block(c, c, levels - 1)

        # Up, from the coarsest level: its last block gives the width of the next one, which
        # spares the finer grid arithmetic
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            next_width = channels[max(0, level - 1)]
            stage = nn.ModuleList()
            for k in range(blocks):
                c_out = next_width if k == blocks - 1 else channels[level]
                stage.append(block(c + channels[level], c_out, level))
                c = c_out
            self.up.append(stage)
        self.norm_out = group_norm(c)
        self.conv_out = zero(nn.Conv2d(c, out_channels, 3, padding=1))

        self.straight = nn.Conv2d(in_channels, out_channels, 1)
        self.gate = zero(nn.Linear(c_emb, out_channels))
        self.scale = zero(nn.Linear(c_emb, out_channels))

    def forward(self, x, c_noise, y=None):
        self.check_size(*x.shape[2:])
        emb = self.embedding(c_noise, y)                                # (B, 4 width)
        gate = self.gate(emb)[:, :, None, None]
        scale = 1 + self.scale(emb)[:, :, None, None]
        straight = self.straight(x) * gate                              # (B, C_out, H, W)

        x = self.conv_in(x)                                             # (B, C_0, H, W)
        kept = []
        for level, stage in enumerate(self.down):
            if level > 0:
                x = F.avg_pool2d(x, 2)                                  # (B, C_l, H/2^l, W/2^l)
            for block in stage:
                x = block(x, emb)
                kept.append(x)
        x = self.middle(x, emb)
        for k, stage in enumerate(self.up):
            if k > 0:
                x = F.interpolate(x, scale_factor=2.0)                  # (B, C_l, H/2^l, W/2^l)
            for block in stage:
                x = block(torch.cat([x, kept.pop()], dim=1), emb)
        x = self.conv_out(F.silu(self.norm_out(x)))                     # (B, C_out, H, W)
        return straight + scale * x

    def embedding(self, c_noise, y):
        emb = self.embed(c_noise)
        if self.label is None:
            return F.silu(emb)
        if y is None:
            y = torch.full_like(c_noise, -1, dtype=torch.long)
        return F.silu(emb + self.label(y + 1))

    def check_size(self, H, W):
        multiple = 2 ** (len(self.down) - 1)
        if H % multiple or W % multiple:
            raise ValueError(
                f"a U-Net of {len(self.down)} levels needs height and width divisible by "
                f"{multiple}, got {H} and {W}"
            )


class Block(nn.Module):
    """x + conv(conv(x)), told c_noise and y by scale and shift; then attention, if asked."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))                           # (B, c_out, H, W)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """x + self-attention over all positions, in heads of 64 channels or more, if there are."""

    def __init__(self, channels):
        super().__init__()
        heads = max(1, channels // 64)
        while channels % heads:
            heads -= 1
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2)                         # (B, 3 C, H W)
        qkv = qkv.unflatten(1, (3, self.heads, -1))                     # (B, 3, heads, C_h, HW)
        q, k, v = qkv.transpose(3, 4).unbind(1)                         # (B, heads, H W, C_h)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class Sinusoid(nn.Module):
    """(B,) -> (B, dim): cosines and sines at dim/2 frequencies from 4 down to about 0.0005.

    The papers start at 1 radian a unit; 4 also tells neighbours apart where c_noise is EDM's
    ln(sigma)/4, a range of 2.7.
    """

    def __init__(self, dim):
        super().__init__()
        omega = 4 * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, c_noise):
        angle = c_noise.float()[:, None] * self.omega  # float32: bf16 turns 999 into 1000
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Guided(nn.Module):
    """Classifier-free guidance (Ho & Salimans 2022; their w is ours less 1).

    net_u + w (net_c - net_u), where net_u is not told the class.
    It is linear, so it serves eps, x_0, v and D alike. Outputs beyond the input's channels are
    learned variances; they stay the conditional ones. w = 1 is the plain conditional network,
    w = 0 the unconditional one.
    """

    def __init__(self, net, w):
        super().__init__()
        self.net = net
        self.w = w

    def forward(self, x, c_noise, y=None):
        net_c = self.net(x, c_noise, y)
        net_u = self.net(x, c_noise, None)
        C = x.shape[1]
        guided = net_u[:, :C] + self.w * (net_c[:, :C] - net_u[:, :C])
        return torch.cat([guided, net_c[:, C:]], dim=1)


class GroupNorm(nn.GroupNorm):
    """In the precision of its weights: in bf16 it is eight times slower on a CPU."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def group_norm(channels):
    return GroupNorm(math.gcd(channels, 16), channels)


def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
