"""Images in, images out: the only file where uint8 and [-1, 1] meet, and where Pillow opens."""
import base64
import contextlib
import io
import logging
import math
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .flags import UserError

# Pillow knows more formats, and for some of them (EPS) it starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LARGEST_IMAGE = 89_478_485  # pixels: Pillow warns of more, and refuses twice as many
GAP = 2  # pixels between the images of a grid

# What Pillow only mentions (bytes after the end, damaged EXIF) is no line of ours.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def to_float(x):
    """uint8 0..255 -> float32 [-1, 1]; floats (latents) pass. Any shape."""
    if x.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    return x


def to_uint8(x):
    """[-1, 1] -> uint8, rounded to nearest, clipped. Any shape."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(x):
    """(C, H, W), uint8 or in [-1, 1], -> a Pillow image; of many channels the first three."""
    if x.dtype != torch.uint8:
        x = to_uint8(x)
    x = x.cpu()
    if len(x) < 3:
        return Image.fromarray(x[0].numpy())
    return Image.fromarray(x[:3].permute(1, 2, 0).contiguous().numpy())


def as_uri(x):
    """(C, H, W), uint8 or in [-1, 1], -> a PNG as text that stands in a page of HTML."""
    file = io.BytesIO()
    to_image(x).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# Pictures of many images

def save_grid(x, path, columns=None, labels=()):
    """Write images (B, C, H, W), uint8 or in [-1, 1], as one picture.

    About square unless `columns` are given; small images are magnified; `labels`: one a row.
    UserError where the file cannot be written.
    """
    save(grid(x, columns, labels), path)


def save_strip(frames, path):
    """Write eight moments of a chain side by side: for each image x above, x_0_hat below.

    frames: [(x, x_0_hat), ...], each (B, C, H, W) in [-1, 1]; x is scaled to be seen.
    UserError where the file cannot be written.
    """
    last = len(frames) - 1
    moments = [frames[round(k * last / 7)] for k in range(8)]
    noisy = torch.stack([visible(x) for x, _ in moments])  # (8, B, C, H, W)
    clean = torch.stack([x_0_hat for _, x_0_hat in moments])
    rows = []
    for i in range(noisy.shape[1]):
        rows.append(noisy[:, i])
        rows.append(clean[:, i])
    save_grid(torch.cat(rows), path, columns=8, labels=["x", "x_0"] * noisy.shape[1])


def save_gif(frames, path):
    """Write a chain as an animation, x above x_0_hat, that stays on its end for a second.

    frames: [(x, x_0_hat), ...], each (B, C, H, W) in [-1, 1]; x is scaled to be seen.
    UserError where the file cannot be written.
    """
    pictures = []
    for x, x_0_hat in frames:
        pair = torch.cat([visible(x), x_0_hat])
        pictures.append(grid(pair, columns=len(x), width=256))
    rest = pictures[1:] + [pictures[-1]] * 20
    save(pictures[0], path, save_all=True, append_images=rest, duration=50, loop=0)


def visible(x, most=0.5):
    """x (B, C, H, W) with a standard deviation of at most `most`: noise is hardly clipped."""
    std = x.std(dim=(1, 2, 3), keepdim=True)
    return x / (std / most).clamp(min=1)


def grid(x, columns=None, labels=(), width=512):
    """Images (B, C, H, W), uint8 or in [-1, 1], as one Pillow picture, `width` or wider."""
    B, _, H, W = x.shape
    if columns is None:
        columns = columns_of(x)
    rows = math.ceil(B / columns)
    zoom = math.ceil(width / (columns * W))
    font = ImageFont.load_default(size=13)
    margin = max((math.ceil(font.getlength(label)) + 8 for label in labels), default=0)
    cell_width = W * zoom + GAP
    cell_height = H * zoom + GAP

    picture_size = (margin + columns * cell_width + GAP, rows * cell_height + GAP)
    picture = Image.new("RGB", picture_size)
    for i in range(B):
        row, column = divmod(i, columns)
        corner = (margin + GAP + column * cell_width, GAP + row * cell_height)
        image = to_image(x[i]).resize((W * zoom, H * zoom), Image.NEAREST)
        picture.paste(image, corner)

    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(labels):
        middle = GAP + row * cell_height + H * zoom / 2
        draw.text((6, middle), label, "white", font, anchor="lm")
    return picture


def columns_of(x):
    """In how many columns images (B, C, H, W) make a picture that is about square."""
    B, _, H, W = x.shape
    return math.ceil(math.sqrt(B * H / W))


def save(picture, path, **options):
    """Write a Pillow image whole or not at all; its suffix names the format."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    options["compress_type"] = zlib.Z_RLE  # PNG's: as small, and in a third of the time
    try:
        kind = Image.registered_extensions()[path.suffix.lower()]
        picture.save(temporary, kind, **options)
        os.replace(temporary, path)
    except (OSError, ValueError, KeyError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {printable(path)}: {because(error)}") from error


# Image files

def open_image(source, name=None):
    """The Pillow image of a file, decoded and upright; of an animation the first.

    source: a path, or a bytes file object; `name` is what an error calls it.
    UserError, one line, for what is no whole image in one of FORMATS, or over LARGEST_IMAGE.
    """
    with reading(source if name is None else name):
        if hasattr(source, "read"):
            return decode(source)
        with open(source, "rb") as file:
            return decode(file)


def decode(file):
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"it is no image ({', '.join(FORMATS)})") from error
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        most = f"{LARGEST_IMAGE / 1e6:.0f} million pixels"
        raise UserError(f"it is {width}x{height}; no image may have over {most}")
    if image.mode == "LAB":  # which Pillow converts to nothing
        raise UserError("its colours are LAB: save it as RGB")
    image.load()
    return ImageOps.exif_transpose(image)


def to_rgb(image):
    """Any Pillow image as 8-bit RGB, transparency laid over white."""
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.max() > 255:
            values = values // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif "a" in image.mode.lower() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image, size):
    """Cut about the centre to the shape of `size` (H, W), then resized to it; None: as is."""
    if size is None or image.size == (size[1], size[0]):
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.LANCZOS)


# What an error says

@contextlib.contextmanager
def reading(name):
    """Around calls of a library that decodes a file: what they raise becomes a UserError.

    Of whatever kind it is: damaged files make Pillow, NumPy, zipfile and tarfile raise
    almost anything.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot read {printable(name)}: {because(error)}") from error


def printable(text):
    """The text on one line: newlines, control characters and stray bytes as escapes."""
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)]
    return "".join(escaped)


def because(error):
    """What a library's exception says, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.strip().split("\n")[0])


# What fits in memory

def memory():
    """Bytes of this machine's memory; where they cannot be known (Windows), 8 GB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8e9


def refuse_what_does_not_fit(source, count, numbers):
    """UserError where `count` images of so many numbers are over a third of the memory."""
    need, limit = count * numbers, memory()
    if need > limit / 3:
        raise UserError(
            f"{source}: {count:,} images need {need / 1e9:.1f} GB, more than a third of this "
            f"machine's {limit / 1e9:.1f} GB: choose a smaller --size"
        )


def refuse_what_unpacks_to(source, size):
    """UserError where a file of `size` unpacked bytes is over a third of the memory."""
    limit = memory()
    if size > limit / 3:
        raise UserError(
            f"{source} unpacks to {size / 1e9:.1f} GB or more, over a third of this "
            f"machine's {limit / 1e9:.1f} GB"
        )
