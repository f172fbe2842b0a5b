"""Data sets: a folder or .zip of images, arrays, idx files, CIFAR-10, or the built-in digits.

Each is decoded once, into one uint8 array in memory. Archives are never unpacked to disk, and
nothing is unpickled. How much a file will ask for is looked at before it gets it.
"""
import gzip
import io
import math
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .digits import digits
from .flags import UserError
from .images import (
    because,
    fit,
    open_image,
    printable,
    reading,
    refuse_what_does_not_fit,
    refuse_what_unpacks_to,
    to_rgb,
)

SUFFIXES = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm".split()
KINDS = (
    "a folder or .zip of images, a .npy or .npz, idx files, cifar-10-binary.tar.gz, "
    "digits or digits64"
)
LARGEST_SIDE = 8192  # pixels
LARGEST_FILE = 300_000_000  # bytes of one unpacked image file
MOST_CLASSES = 10_000
BUILT_IN = {"digits": (32, 32), "digits64": (64, 64)}  # their sizes where none is given
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: a label and an image


def load(source, size=None, channels=None):
    """Images (N, C, H, W) uint8, labels (N,) int64 or None, class names ([] without labels).

    source: a path, or digits (32x32) or digits64 (64x64), which are built in. size: (H, W) or
    one number; by default the images' own, which must then agree. Images are cropped to that
    shape about their centre, then resized. channels: 1 or 3; by default 1 if every image is
    gray, else 3.
    Float arrays (latents) come back as they are, float32 (N, C, H, W).
    UserError, one line, for what cannot be used.
    """
    size = height_and_width(size)
    if channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 or 3, got {channels}")
    if str(source) in BUILT_IN:
        images, labels = digits(size or BUILT_IN[str(source)], channels or 3)
        return images, labels, [str(digit) for digit in range(10)]
    if str(source) == "":
        raise UserError(f"no data set is named: give {KINDS}")
    try:
        return read(Path(source), size, channels)
    except UserError as error:
        raise UserError(printable(error)) from error
    except OSError as error:
        raise UserError(f"cannot read {printable(source)}: {because(error)}") from error


def load_like(checkpoint, source):
    """Images (N, C, H, W) of a checkpoint's shape; labels (N,), None where it has no classes.

    UserError where they do not fit it.
    """
    shape = list(checkpoint["shape"])
    classes = checkpoint["classes"]
    channels, *size = shape
    if checkpoint.get("latents"):
        channels, size = None, None
    try:
        images, labels, names = load(source, size, channels)
    except UserError as error:
        if source != checkpoint["config"]["data"]:
            raise
        hint = "the images of this run; --data names others for --nll"
        raise UserError(f"{error} ({hint})") from error
    source = printable(source)
    if list(images.shape[1:]) != shape:
        holds = "x".join(map(str, images.shape[1:]))
        trained_on = "x".join(map(str, shape))
        raise UserError(f"{source} holds {holds}, the model was trained on {trained_on}")
    if not classes:
        return images, None
    if names != classes:
        known = ", ".join(classes[:10])
        there = ", ".join(names[:10]) or "none"
        raise UserError(f"the model knows the classes {known}; {source} has {there}")
    return images, labels


def hold_out(images, labels, overfit):
    """Two pairs (images, labels): to train on, and up to 128 others to measure on.

    images (N, ...), labels (N,) or None. With `overfit` so many images are trained on, and
    some of the same are measured on; likewise where there are fewer than 40.
    """
    total = len(images)
    if overfit or total < 40:
        trained_on = evenly(overfit or total, total)
        held_out = trained_on[evenly(128, len(trained_on))]
    else:
        held_out = evenly(min(128, total // 20), total)
        trained_on = torch.ones(total, dtype=torch.bool)
        trained_on[held_out] = False
    if labels is None:
        return (images[trained_on], None), (images[held_out], None)
    return (images[trained_on], labels[trained_on]), (images[held_out], labels[held_out])


def evenly(n, total):
    """Indices (n,) of `total` images, evenly spaced, for a folder's come class by class.

    All of them where there are fewer than n.
    """
    if n >= total:
        return torch.arange(total)
    return torch.linspace(0, total - 1, n).long()


def height_and_width(size):
    """None, one number or two -> None or (H, W)."""
    if size is None:
        return None
    if not isinstance(size, (tuple, list)):
        size = (size,)
    if len(size) == 1:
        size = (size[0], size[0])
    if len(size) != 2 or min(size) < 1:
        got = " ".join(map(str, size))
        must_be = "one number or height and width, all positive"
        raise UserError(f"size must be {must_be}, got {got}")
    if max(size) > LARGEST_SIDE:
        raise UserError(f"size must be at most {LARGEST_SIDE}, got {max(size)}")
    return tuple(size)


def read(path, size, channels):
    if path.is_dir():
        return from_folder(path, size, channels)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    name = path.name.lower()
    if path.is_file():
        if name.endswith(".zip"):
            return from_zip(path, size, channels)
        if name.endswith((".npy", ".npz")):
            return from_arrays(path, size, channels)
        if "idx3-ubyte" in name:
            return from_idx(path, size, channels)
        if name.endswith(".bin"):
            return from_cifar_files([path], size, channels)
        if name.endswith((".tar.gz", ".tgz", ".tar")):
            return from_cifar_archive(path, size, channels)
    raise UserError(f"cannot read {path}: give {KINDS}")


# Image files

def from_folder(folder, size, channels):
    """Images in a folder and its sub-folders; or idx files, or CIFAR-10's, if it holds any."""
    idx = sorted(folder.glob("*images*idx3-ubyte*"))
    if idx:
        of_training = [path for path in idx if "train" in path.name]
        return from_idx((of_training + idx)[0], size, channels)
    cifar = sorted(folder.glob("data_batch_*.bin"))
    if cifar:
        return from_cifar_files(cifar, size, channels)
    paths = []
    for inside, _, names in os.walk(folder, onerror=complain):
        paths += [Path(inside, name) for name in names]
    files = [path for path in sorted(paths) if path.is_file()]
    return from_files(folder, files, open_image, size, channels)


def complain(error):
    raise UserError(f"cannot read {error.filename}: {because(error)}") from error


def from_zip(path, size, channels):
    with open_zip(path) as archive:
        entries = {}
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            refuse_what_points_outside(path, entry.filename)
            if not entry.filename.endswith("/"):
                entries[PurePosixPath(entry.filename)] = entry

        def open_entry(name):
            entry = entries[name]
            if entry.file_size > LARGEST_FILE:
                unpacks_to = f"it unpacks to {entry.file_size / 1e6:,.0f} MB"
                limit = f"no image may be over {LARGEST_FILE / 1e6:.0f} MB"
                raise UserError(f"cannot read {name}: {unpacks_to}; {limit}")
            with reading(name):
                content = archive.read(entry)
            return open_image(io.BytesIO(content), name)

        return from_files(path, list(entries), open_entry, size, channels)


def open_zip(path):
    with reading(path):
        return zipfile.ZipFile(path)


def refuse_what_points_outside(path, name):
    if ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name):
        raise UserError(f"{path} holds a name that points outside it: {name}")


def from_files(source, paths, open_one, size, channels):
    """Decode image files in threads; the folder that a file lies in is its class.

    paths: of all files there; open_one(path) -> Pillow image.
    """
    files = [path for path in paths if is_image(path)]
    if not files:
        raise UserError(f"no images in {source}: {what_is_there(paths)}")
    if size is not None:
        refuse_what_does_not_fit(source, len(files), (channels or 3) * math.prod(size))

    def decode(path):
        image = open_one(path)
        is_gray = image.mode[0] in "1LIF"
        image = fit(to_rgb(image), size)
        if channels == 1:
            return np.asarray(image.convert("L"))[None], is_gray
        return np.asarray(image).transpose(2, 0, 1), is_gray

    first, all_gray = decode(files[0])  # (C, H, W)
    refuse_what_does_not_fit(source, len(files), first.size)
    images = np.empty((len(files), *first.shape), np.uint8)
    pool = ThreadPoolExecutor(os.cpu_count())
    about = f"reading {printable(source.name)}"
    try:
        decoded = pool.map(decode, files)
        with tqdm(decoded, about, len(files), leave=False, delay=1) as bar:
            for i, (image, is_gray) in enumerate(bar):
                refuse_another_size(files[0], first, files[i], image)
                images[i] = image
                all_gray = all_gray and is_gray
    finally:
        pool.shutdown(cancel_futures=True)
    if channels is None and all_gray:
        images = images[:, :1].copy()
    labels, names = classes_of(files)
    return torch.from_numpy(images), labels, names


def is_image(path):
    is_mac_metadata = path.name.startswith("._")
    return path.suffix.lower() in SUFFIXES and not is_mac_metadata


def what_is_there(paths):
    if not paths:
        return "it is empty"
    suffixes = sorted({path.suffix.lower() or "no suffix" for path in paths})
    return f"found only {', '.join(suffixes[:8])}"


def refuse_another_size(first_path, first, path, image):
    if image.shape != first.shape:
        _, first_H, first_W = first.shape
        _, H, W = image.shape
        differ = f"{first_path.name} is {first_W}x{first_H}, {path.name} {W}x{H}"
        raise UserError(f"images differ in size ({differ}): choose one, for example --size 64")


def classes_of(files):
    """Labels (N,) and class names by the files' folders; None and [] where there is one."""
    folders = sorted({path.parent for path in files})
    if len(folders) == 1:
        return None, []
    number = {folder: k for k, folder in enumerate(folders)}
    labels = torch.tensor([number[path.parent] for path in files])
    return labels, [printable(folder.name) for folder in folders]


# Arrays

def from_arrays(path, size, channels):
    """.npy: uint8 (N,C,H,W), (N,H,W,C) or (N,H,W), or float latents (N,C,H,W).

    .npz: the same, and integer labels (N,) or (N, 1).
    """
    arrays = read_arrays(path)
    images = choose_images(path, arrays)
    N = len(images)
    integers = [array for array in arrays.values() if array.dtype.kind in "iu"]
    of_images = [array.ravel() for array in integers if array.shape in ((N,), (N, 1))]
    labels, names = labels_of(path, of_images[0]) if of_images else (None, [])
    if images.dtype.kind == "f":
        return latents(path, images, size, channels), labels, names
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in (1, 3):
        raise UserError(f"{path} has neither 1 nor 3 channels: {images.shape}")
    return fit_array(path, images, size, channels), labels, names


def read_arrays(path):
    """{name: array} of a .npy ("") or .npz file, those of training first."""
    if not zipfile.is_zipfile(path):
        with reading(path), open(path, "rb") as file:
            return {"": read_array(file, path.stat().st_size)}
    with open_zip(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        refuse_what_unpacks_to(path, sum(entry.file_size for entry in entries))
        entries.sort(key=lambda entry: "train" not in entry.filename)
        arrays = {}
        for entry in entries:
            with reading(f"{entry.filename} in {path}"), archive.open(entry) as file:
                name = entry.filename.removesuffix(".npy")
                arrays[name] = read_array(file, entry.file_size)
    return arrays


def read_array(file, size):
    """The array in a .npy file of `size` bytes; its header is believed only as far as those."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise UserError("it holds Python objects, which are never unpickled here")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed > size:
        raise UserError(f"its header tells of {dtype} {shape}, more than it holds")
    refuse_what_unpacks_to("it", claimed)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def choose_images(path, arrays):
    """The one array of images, or the one of training images."""
    several = [name for name, array in arrays.items() if array.ndim >= 3]
    of_training = [name for name in several if "train" in name]
    if len(several) > 1 and len(of_training) != 1:
        names = ", ".join(several)
        raise UserError(
            f"{path} holds several arrays of images, {names}: keep one, or call it x_train"
        )
    if several:
        images = arrays[several[0]]
        is_uint8_or_float = images.dtype == np.uint8 or images.dtype.kind == "f"
        if images.ndim <= 4 and is_uint8_or_float and images.size:
            return images
    holds = "; ".join(f"{array.dtype} {array.shape}" for array in arrays.values())
    raise UserError(
        f"{path} must hold images: uint8 (N,C,H,W), (N,H,W,C) or (N,H,W), or float (N,C,H,W); "
        f"it holds {holds or 'no array'}"
    )


def latents(path, images, size, channels):
    """Float arrays (N, C, H, W) as they are."""
    is_other_size = size not in (None, images.shape[2:])
    is_other_channels = channels not in (None, images.shape[1])
    if images.ndim != 4 or is_other_size or is_other_channels:
        shape = images.shape
        raise UserError(
            f"float arrays are latents (N,C,H,W), used as they are; {path} is {shape}"
        )
    if not np.isfinite(images).all():
        raise UserError(f"{path} holds values that are not finite")
    return torch.from_numpy(images.astype(np.float32))


def labels_of(path, labels, names=None):
    """Labels (N,) int64 of integers (N,), and class names, by default their numbers."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise UserError(f"{path} has labels {low} to {high}; they must be 0 to 9,999")
    if names is None:
        names = [str(k) for k in range(high + 1)]
    if high >= len(names):
        raise UserError(f"{path} has the label {high}, but names for {len(names)} classes only")
    return torch.from_numpy(labels.astype(np.int64)), names


def fit_array(path, images, size, channels):
    """Images (N, H, W, C) uint8 -> (N, C, H, W) of that size and so many channels."""
    N, H, W, C = images.shape
    if size is not None:
        H, W = size
    refuse_what_does_not_fit(path, N, (channels or C) * H * W)
    if (H, W) != images.shape[1:3]:
        images = np.stack([resize(image, size) for image in images])
    if channels == 1 and C == 3:
        images = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in images])
        images = images[..., None]
    if channels == 3 and C == 1:
        images = images.repeat(3, axis=-1)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def resize(image, size):
    """(h, w, C) uint8 -> (H, W, C)."""
    if image.shape[-1] == 1:
        return np.asarray(fit(Image.fromarray(image[..., 0]), size))[..., None]
    return np.asarray(fit(Image.fromarray(image), size))


# MNIST's files

def from_idx(path, size, channels):
    """...images-idx3-ubyte, .gz or not, with ...labels-idx1-ubyte beside it.

    28x28 is padded to 32x32, unless that size is asked for.
    """
    images = read_idx(path, 3)
    if not images.size:
        raise UserError(f"{path} holds no images")
    labels, names = None, []
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels_path.exists():
        numbers = read_idx(labels_path, 1)
        if len(numbers) != len(images):
            raise UserError(f"{labels_path} has {len(numbers)} labels, not {len(images)}")
        labels, names = labels_of(labels_path, numbers)
    if images.shape[1:] == (28, 28) and size in (None, (32, 32)):
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return fit_array(path, images[..., None], size, channels), labels, names


def read_idx(path, dimensions):
    """The bytes of an idx file, as an array of so many dimensions."""
    start = 4 + 4 * dimensions
    not_whole = f"{path} is not a whole idx file of bytes in {dimensions} dimensions"
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rb") as file:
        header = file.read(start)
    if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(not_whole)
    shape = np.frombuffer(header, ">u4", offset=4).tolist()
    size = start + math.prod(shape)
    refuse_what_unpacks_to(path, size)
    with reading(path), opened(path, "rb") as file:
        content = file.read(size + 1)
    if len(content) != size:
        raise UserError(not_whole)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# CIFAR-10's binary version

def from_cifar_files(paths, size, channels):
    """data_batch_*.bin, with batches.meta.txt beside them or not."""
    refuse_what_unpacks_to(paths[0], sum(path.stat().st_size for path in paths))
    batches = [path.read_bytes() for path in paths]
    names_path = paths[0].with_name("batches.meta.txt")
    names = names_path.read_bytes() if names_path.exists() else b""
    return from_cifar(paths[0], batches, names, size, channels)


def from_cifar_archive(path, size, channels):
    """cifar-10-binary.tar.gz."""
    contents = {}
    with reading(path), tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        members = {PurePosixPath(member.name).name: member for member in files}
        refuse_what_unpacks_to("it", sum(member.size for member in members.values()))
        for name in sorted(members):
            if re.fullmatch(r"data_batch_\d\.bin|batches\.meta\.txt", name):
                contents[name] = archive.extractfile(members[name]).read()
    names = contents.pop("batches.meta.txt", b"")
    return from_cifar(path, list(contents.values()), names, size, channels)


def from_cifar(path, batches, names, size, channels):
    raw = b"".join(batches)
    if not raw or len(raw) % CIFAR_RECORD:
        raise UserError(
            f"{path} is not CIFAR-10's binary version (cifar-10-binary.tar.gz); "
            "its Python version is never unpickled here"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = [printable(name) for name in names.decode(errors="replace").split()]
    labels, names = labels_of(path, records[:, 0], names or None)
    return fit_array(path, images, size, channels), labels, names
