"""The built-in set: 0 to 9 in bold, in random place, size, slant and hue, on soft colours."""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

from .flags import UserError
from .images import refuse_what_does_not_fit

SAMPLES = 3  # samples a pixel, in each direction
GLYPH = 96  # pixels of a glyph's side
BATCH = 500  # images drawn at once


def digits(size=(32, 32), channels=3, count=20_000, seed=0):
    """Images (count, channels, H, W) uint8, labels (count,) int64, the same for a seed.

    size: (H, W), 8 or more; channels: 1 or 3. UserError for less, or what memory cannot hold.
    """
    H, W = size
    if min(H, W) < 8:
        raise UserError(f"digits need a size of 8 or more, got {H} {W}")
    refuse_what_does_not_fit("digits", count, channels * H * W)

    random = torch.Generator().manual_seed(seed)
    glyphs = torch.stack([glyph(digit) for digit in range(10)])  # (10, 1, 96, 96)
    labels = torch.arange(count)[torch.randperm(count, generator=random)] % 10
    images = torch.empty(count, channels, H, W, dtype=torch.uint8)
    for start in range(0, count, BATCH):
        these = slice(start, start + BATCH)
        drawn = draw(glyphs[labels[these]], H, W, random)
        if channels == 1:
            drawn = drawn.mean(1, keepdim=True)
        images[these] = (255 * drawn).round().to(torch.uint8)
    return images, labels


def draw(glyphs, H, W, random):
    """Colour images (n, 3, H, W) in [0, 1] of glyphs (n, 1, 96, 96) in [0, 1]."""
    n = len(glyphs)
    height = uniform(0.7, 0.88, (n, 1, 1), random)  # of the image's shorter side
    slant = uniform(-0.25, 0.25, (n, 1, 1), random)
    turn = uniform(-0.1, 0.1, (n, 1, 1), random)
    angle = uniform(0, 2 * math.pi, (n, 1, 1), random)  # of the background's ramp

    # Where each sample of the image lies on the glyph, which spans [-1, 1]
    width_x = height * min(H, W) / W
    width_y = height * min(H, W) / H
    shift_x = uniform(-1, 1, (n, 1, 1), random) * (1 - width_x)
    shift_y = uniform(-1, 1, (n, 1, 1), random) * (1 - width_y)
    x = (centres(SAMPLES * W) - shift_x) / width_x  # (n, 1, 3W)
    y = (centres(SAMPLES * H)[:, None] - shift_y) / width_y  # (n, 3H, 1)

    # A few at a time: the samples need more memory than the images
    parts = zip(*(values.split(50) for values in (glyphs, x, y, slant, turn)))
    ink = torch.cat([cover(*part) for part in parts])  # (n, 1, H, W)

    across = angle.cos() * centres(W) + angle.sin() * centres(H)[:, None]
    ramp = torch.sigmoid(2.5 * across)[:, None]  # (n, 1, H, W)
    one_end = colour(n, (0.1, 0.5), (0.5, 1.0), random)  # (n, 3, 1, 1)
    other_end = colour(n, (0.1, 0.5), (0.5, 1.0), random)
    paper = ramp * one_end + (1 - ramp) * other_end
    return (1 - ink) * paper + ink * colour(n, (0.9, 1.0), (0.1, 0.65), random)


def cover(glyphs, x, y, slant, turn):
    """How much of each pixel a glyph covers: (n, 1, H, W) in [0, 1]."""
    along = turn.cos() * x + (slant - turn.sin()) * y  # (n, 3H, 3W)
    down = turn.sin() * x + turn.cos() * y
    where = torch.stack([along, down], dim=3)
    return F.avg_pool2d(F.grid_sample(glyphs, where, align_corners=False), SAMPLES)


def uniform(low, high, shape, random):
    return low + (high - low) * torch.rand(shape, generator=random)


def colour(n, values, saturations, random):
    """Colours (n, 3, 1, 1) of any hue, value and saturation between their two limits."""
    thirds = 2 * math.pi / 3 * torch.arange(3)
    hue = uniform(0, 2 * math.pi, (n, 1), random) - thirds
    value = uniform(*values, (n, 1), random)
    saturation = uniform(*saturations, (n, 1), random)
    return (value * (1 - saturation * (1 - hue.cos()) / 2))[:, :, None, None]


def centres(k):
    """The centres of k pixels across [-1, 1]: (k,)."""
    return (2 * torch.arange(k) + 1) / k - 1


def glyph(digit):
    """A digit in Pillow's font, in bold, as high as its square: (1, 96, 96) in [0, 1]."""
    font = ImageFont.load_default(size=GLYPH)
    image = Image.new("L", (2 * GLYPH, 2 * GLYPH))
    corner = (GLYPH // 2, GLYPH // 2)
    ImageDraw.Draw(image).text(corner, str(digit), fill=255, font=font, stroke_width=5)
    image = image.crop(image.getbbox())
    image = ImageOps.pad(image, (GLYPH, GLYPH), Image.LANCZOS)
    return torch.from_numpy(np.array(image)).float()[None] / 255
