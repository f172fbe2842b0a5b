"""Pixels in, pixels out: the only file where uint8 and [-1, 1] meet.

`load` reads a folder or .zip of images, .npy/.npz arrays, MNIST's idx files, CIFAR-10's binary archive, or draws the
built-in set, "digits". Everything is decoded once, into one uint8 array in memory.
Whatever cannot be used raises ValueError (or OSError) with one line that names it.
"""
import gzip
import io
import math
import os
import re
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST = 300_000_000  # bytes of one unpacked image file; Pillow's own limit, 89 million pixels, is as large
warnings.simplefilter("error", Image.DecompressionBombWarning)


def load(source, size=None, channels=None):
    """Images (N, C, H, W) uint8, labels (N,) int64 or None, class names (a list, empty without labels).

    size: (H, W) or one number; by default the images' own, which must then agree (digits: 32). Images are cropped to
    that shape about their centre, then resized. channels: 1 or 3; by default 1 if every image is gray, else 3.
    Float arrays (latents) come back as they are, float32 (N, C, H, W).
    """
    if size is not None:
        size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        size = size * 2 if len(size) == 1 else size
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be one number or height and width, all positive, got {' '.join(map(str, size))}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if str(source) == "digits":
        return *digits(size or (32, 32), channels or 3), [str(d) for d in range(10)]
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no such file or folder: {source}")
    name = path.name.lower()
    if path.is_dir():
        idx, binary = sorted(path.glob("*images*idx3-ubyte*")), sorted(path.glob("data_batch_*.bin"))
        if idx or binary:
            return from_idx(next((p for p in idx if "train" in p.name), idx[0]), size, channels) if idx else from_cifar(binary, size, channels)
        return from_files(path, [p for p in sorted(path.rglob("*")) if p.is_file()], lambda p: p.read_bytes(), size, channels)
    if name.endswith(".zip"):
        return from_zip(path, size, channels)
    if name.endswith((".npy", ".npz")):
        return from_arrays(path, size, channels)
    if "idx3-ubyte" in name:
        return from_idx(path, size, channels)
    if name.endswith((".bin", ".tar.gz", ".tgz", ".tar")):
        return from_cifar([path], size, channels)
    raise ValueError(f"cannot read {source}: give a folder or .zip of images, a .npy or .npz, idx files, cifar-10-binary.tar.gz, or digits")


def to_float(x):
    """uint8 0..255 -> float32 [-1, 1]; floats (latents) pass."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """[-1, 1] -> uint8, rounded to nearest, clipped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(x):
    """(C, H, W), uint8 or in [-1, 1], -> a Pillow image; of more than three channels the first three."""
    x = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu()
    return Image.fromarray(x[0].numpy() if len(x) < 3 else x[:3].permute(1, 2, 0).contiguous().numpy())


def save_grid(x, path, columns=None, labels=()):
    """Write images (B, C, H, W), uint8 or in [-1, 1], as one picture, about square; small images are magnified."""
    grid(x, columns, labels).save(path)


def grid(x, columns=None, labels=(), width=512):
    """Images (B, C, H, W), uint8 or in [-1, 1], as one Pillow picture of this width or more; labels: one a row."""
    B, _, H, W = x.shape
    columns = columns or math.ceil(math.sqrt(B * H / W))
    rows, gap, zoom = math.ceil(B / columns), 2, math.ceil(width / (columns * W))
    font = ImageFont.load_default(size=13)
    left = gap + max((math.ceil(font.getlength(label)) + 8 for label in labels), default=0)
    picture = Image.new("RGB", (left + columns * (W * zoom + gap), rows * (H * zoom + gap) + gap))
    for i in range(B):
        corner = (left + i % columns * (W * zoom + gap), gap + i // columns * (H * zoom + gap))
        picture.paste(to_image(x[i]).resize((W * zoom, H * zoom), Image.NEAREST), corner)
    for row, label in enumerate(labels):
        ImageDraw.Draw(picture).text((6, gap + row * (H * zoom + gap) + H * zoom / 2), label, "white", font, anchor="lm")
    return picture


# Image files

def from_zip(path, size, channels):
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole .zip file: {error}")
    names = [name for name in sorted(archive.namelist()) if not name.endswith("/")]
    for name in names:
        if ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name):
            raise ValueError(f"{path} holds a name that points outside it: {name}")

    def read(p):
        if archive.getinfo(str(p)).file_size > LARGEST:
            raise ValueError(f"it unpacks to {archive.getinfo(str(p)).file_size / 1e6:,.0f} MB; no image may be over {LARGEST / 1e6:.0f} MB")
        return archive.read(str(p))
    return from_files(path, [PurePosixPath(name) for name in names], read, size, channels)


def from_files(source, paths, read, size, channels):
    """Decode image files, in threads; the folder that a file lies in is its class, where there are several."""
    files = [p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith("._")]
    if not files:
        seen = sorted({p.suffix.lower() or "no suffix" for p in paths})
        raise ValueError(f"no images in {source}: " + (f"found only {', '.join(seen[:8])}" if seen else "it is empty"))

    def decode(p):
        try:
            image = Image.open(io.BytesIO(read(p)))
            gray = image.mode[0] in "1LIF"
            image = np.asarray(fit(to_rgb(image), size).convert("L" if channels == 1 else "RGB"))
            return image[None] if channels == 1 else image.transpose(2, 0, 1), gray
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"cannot read {p}: {error}")

    first, all_gray = decode(files[0])                                        # (C, H, W)
    refuse_what_does_not_fit(source, len(files), first.size)
    images = np.empty((len(files), *first.shape), np.uint8)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for i, (image, gray) in enumerate(tqdm(pool.map(decode, files), f"reading {Path(source).name}", len(files), leave=False)):
            if image.shape != first.shape:
                raise ValueError(f"images differ in size ({files[0].name} is {first.shape[2]}x{first.shape[1]}, {files[i].name} "
                                 f"{image.shape[2]}x{image.shape[1]}): choose one, for example --size 64")
            images[i] = image
            all_gray = all_gray and gray
    finally:
        pool.shutdown(cancel_futures=True)
    images = images[:, :1].copy() if channels is None and all_gray else images
    folders = {folder: k for k, folder in enumerate(sorted({p.parent for p in files}))}
    if len(folders) == 1:
        return torch.from_numpy(images), None, []
    return torch.from_numpy(images), torch.tensor([folders[p.parent] for p in files]), [folder.name for folder in folders]


def to_rgb(image):
    """Any Pillow image, upright, 8 bits, transparency laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                            # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values // 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image, size):
    """Centre crop to the shape of size (H, W), then resize to it; None leaves the image as it is."""
    return image if size is None or size[::-1] == image.size else ImageOps.fit(image, size[::-1], Image.LANCZOS)


def memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):                             # Windows
        return 8e9


def refuse_what_does_not_fit(source, count, numbers):
    if count * numbers > memory() / 3:
        raise ValueError(f"{source}: {count:,} images need {count * numbers / 1e9:.1f} GB, more than a third of this machine's "
                         f"{memory() / 1e9:.1f} GB: choose a smaller --size")


def refuse_what_unpacks_to(source, size):
    if size > memory() / 3:
        raise ValueError(f"{source} unpacks to {size / 1e9:.1f} GB or more, over a third of this machine's {memory() / 1e9:.1f} GB")


def to_nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


# Arrays

def from_arrays(path, size, channels):
    """.npy: uint8 (N,C,H,W), (N,H,W,C) or (N,H,W), or float latents (N,C,H,W). .npz: the same, and integer labels (N,)."""
    try:
        if zipfile.is_zipfile(path):
            refuse_what_unpacks_to(path, sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()))
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            named = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in sorted(loaded.files, key=lambda name: "train" not in name)}
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}")
    arrays, several = list(named.values()), [name for name, a in named.items() if a.ndim >= 3]
    if len(several) > 1 and not ("train" in several[0] and "train" not in several[1]):
        raise ValueError(f"{path} holds several arrays of images, {', '.join(several)}: keep one, or call it x_train")
    images = named[several[0]] if several else None
    if images is None or images.ndim > 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f") or not images.size:
        raise ValueError(f"{path} must hold images: uint8 (N,C,H,W), (N,H,W,C) or (N,H,W), or float (N,C,H,W); it holds "
                         + "; ".join(f"{a.dtype} {a.shape}" for a in arrays))
    y = next((a.ravel() for a in arrays if a.shape in ((len(images),), (len(images), 1)) and a.dtype.kind in "iu"), None)
    if images.dtype.kind == "f":
        if images.ndim != 4 or size is not None and size != images.shape[2:] or channels not in (None, images.shape[1]):
            raise ValueError(f"float arrays are latents (N,C,H,W), used as they are; {path} is {images.shape}")
        if not np.isfinite(images).all():
            raise ValueError(f"{path} holds values that are not finite")
        return torch.from_numpy(images.astype(np.float32)), *labels_of(y)
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[-1] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{path} has neither 1 nor 3 channels: {images.shape}")
    return to_nchw(fit_array(images, size, channels)), *labels_of(y)


def labels_of(y, names=None):
    if y is None:
        return None, []
    names = names or [str(k) for k in range(int(y.max()) + 1)]
    return torch.from_numpy(y.astype(np.int64)), names


def fit_array(images, size, channels):                                        # (N, H, W, C) uint8
    if size not in (None, images.shape[1:3]):
        images = np.stack([np.asarray(fit(Image.fromarray(x.squeeze()), size)).reshape(*size, -1) for x in images])
    if channels == 1 and images.shape[-1] == 3:
        return np.stack([np.asarray(Image.fromarray(x).convert("L"))[..., None] for x in images])
    return images.repeat(3, axis=-1) if channels == 3 and images.shape[-1] == 1 else images


def from_idx(path, size, channels):
    """MNIST's files: ...images-idx3-ubyte, .gz or not, with ...labels-idx1-ubyte beside it. 28x28 is padded to 32x32."""
    def read(path, dimensions):
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                raw = file.read(int(memory() / 3) + 1)
            refuse_what_unpacks_to(path, len(raw))
        except (OSError, EOFError) as error:
            raise ValueError(f"cannot read {path}: {error}")
        shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4).tolist() if len(raw) >= 4 + 4 * dimensions else []
        if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != 4 + 4 * dimensions + math.prod(shape):
            raise ValueError(f"{path} is not a whole idx file of bytes in {dimensions} dimensions")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    images = read(path, 3)[..., None]
    if images.shape[1:3] == (28, 28) and size in (None, (32, 32)):
        images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    return to_nchw(fit_array(images, size, channels)), *labels_of(read(beside, 1) if beside.exists() else None)


def from_cifar(paths, size, channels):
    """CIFAR-10's binary version: cifar-10-binary.tar.gz, or its data_batch_*.bin."""
    names = None
    if paths[0].suffix == ".bin":
        batches, beside = [p.read_bytes() for p in paths], paths[0].with_name("batches.meta.txt")
        names = beside.read_text().split() if beside.exists() else None
    else:
        try:
            with tarfile.open(paths[0]) as archive:
                members = {PurePosixPath(m.name).name: m for m in archive.getmembers() if m.isfile()}
                refuse_what_unpacks_to(paths[0], sum(m.size for m in members.values()))
                batches = [archive.extractfile(members[n]).read() for n in sorted(members) if re.fullmatch(r"data_batch_\d\.bin", n)]
                if "batches.meta.txt" in members:
                    names = archive.extractfile(members["batches.meta.txt"]).read().decode().split()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"cannot read {paths[0]}: {error}")
    raw = b"".join(batches)
    if not raw or len(raw) % 3073:
        raise ValueError(f"{paths[0]} is not CIFAR-10's binary version (cifar-10-binary.tar.gz); its Python version is never unpickled here")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return to_nchw(fit_array(images, size, channels)), *labels_of(records[:, 0], names)


# The built-in set

def digits(size=(32, 32), channels=3, count=20_000, seed=0):
    """0 to 9 in bold, drawn in random place, size, slant and hue over soft two-colour backgrounds.

    Images (count, channels, H, W) uint8 and labels (count,), the same for the same seed.
    """
    H, W = size
    if min(H, W) < 8:
        raise ValueError(f"digits need a size of 8 or more, got {H} {W}")
    refuse_what_does_not_fit("digits", count, channels * H * W)
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=random)

    def colour(dim, bright, pale, full):              # (n, 3, 1, 1) of any hue, between these values and saturations
        hue = uniform(0, 2 * math.pi, n, 1) - 2 * math.pi / 3 * torch.arange(3)
        return (uniform(dim, bright, n, 1) * (1 - uniform(pale, full, n, 1) * (1 - hue.cos()) / 2))[:, :, None, None]

    def centres(k):                                   # of k pixels across [-1, 1]
        return (2 * torch.arange(k) + 1) / k - 1

    glyphs = torch.stack([glyph(d) for d in range(10)])                       # (10, 1, 96, 96) in [0, 1]
    labels = torch.arange(count)[torch.randperm(count, generator=random)] % 10
    images = torch.empty(count, channels, H, W, dtype=torch.uint8)
    for start in range(0, count, 500):
        glyph_of, n = glyphs[labels[start:start + 500]], len(labels[start:start + 500])
        height, slant, turn, angle = (uniform(low, high, n, 1, 1) for low, high in ((0.7, 0.88), (-0.25, 0.25), (-0.1, 0.1), (0, 2 * math.pi)))
        width_x, width_y = height * min(H, W) / W, height * min(H, W) / H
        x = (centres(3 * W) - uniform(-1, 1, n, 1, 1) * (1 - width_x)) / width_x          # three samples a pixel and direction
        y = (centres(3 * H)[:, None] - uniform(-1, 1, n, 1, 1) * (1 - width_y)) / width_y
        where = torch.stack([turn.cos() * x + (slant - turn.sin()) * y, turn.sin() * x + turn.cos() * y], dim=3)
        ink = F.avg_pool2d(F.grid_sample(glyph_of, where, align_corners=False), 3)        # (n, 1, H, W)
        ramp = torch.sigmoid(2.5 * (angle.cos() * centres(W) + angle.sin() * centres(H)[:, None]))[:, None]
        paper = ramp * colour(0.1, 0.5, 0.5, 1.0) + (1 - ramp) * colour(0.1, 0.5, 0.5, 1.0)
        image = (1 - ink) * paper + ink * colour(0.9, 1.0, 0.1, 0.65)
        image = image if channels == 3 else image.mean(1, keepdim=True)
        images[start:start + 500] = (255 * image).round().to(torch.uint8)
    return images, labels


def glyph(digit):
    """A digit in Pillow's own font, in bold, filling the height of a square: (1, 96, 96) in [0, 1]."""
    font = ImageFont.load_default(size=96)
    image = Image.new("L", (192, 192))
    ImageDraw.Draw(image).text((48, 48), str(digit), fill=255, font=font, stroke_width=5)
    image = image.crop(image.getbbox())
    image = ImageOps.pad(image, (96, 96), Image.LANCZOS)
    return torch.from_numpy(np.array(image)).float()[None] / 255
