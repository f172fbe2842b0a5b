"""Bad inputs at random for the four commands:  python tests/fuzz.py --n 500 --seed 0

Each is one call of a command's main, in a fresh folder. What must not be: a traceback, a crash,
an error of more than one line, a file of the user's changed or gone. Input k depends on (seed,
k) alone: --first 17 --n 1 repeats the 18th. Exit code 1 if anything was found.

A second process makes the calls, so that a crash is counted and survived.
"""
import _thread
import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edit
import evaluate
import sample
import train
from edm import ode_sample
from plumbing import checkpoint, flags
from plumbing.flags import flags_of
from unet import UNet

SECONDS = 4  # after which a call is interrupted, as by Ctrl-C
PROGRESS = re.compile(r"\[\d\d:\d\d|^\w+: 0it")  # a line of tqdm's
KINDS = {}  # {name: function(dice) -> (command, argv)}, which spoils a file of this folder
ODD_NUMBERS = "-1 0 1 2 3 7 99 9999 12345678 99999999999999999999 0.5 nan inf 1e300 1e-9"
ODD_NUMBERS = ODD_NUMBERS.split()
ODD_WORDS = "-inf -99999999999999999999 True None 0-3 3-0 0,1 cpu all x .. . ~ -- - --x=1 %s"
ODD_WORDS = ODD_NUMBERS + ODD_WORDS.split() + ["\u0663", "\u00b2", "\u00e9", "\udcff", "", " "]
ODD_WORDS += ["a b", "a\nb", "\x1b[1m", "x" * 300, "1 2"]
ODD_PATHS = "nothing nothing/at/all . .. ddpm ddpm/ckpt.pt set.npz set.npz/x a.png mean.pt 3 -1"
ODD_PATHS = ODD_PATHS.split() + ["", " ", "a b.png", "a\nb.png", "\u00e9", "\udcff", "%s.npy"]
ODD_PATHS += ["x" * 300, "y/" * 3000, os.devnull]
ODD_NAMES = "./z.png a//z.png ../z.png /z.png z .png c:\\z.png a\\..\\z.png a/".split()
ODD_JSON = ["", "{", "[]", "{}", "3", "null", '"x"', '{"a": {}}', "[" * 10**5, "\ud800", "NaN"]
ODD_JSON += ['{"step 2": {"method": "ddpm", "trained_on": "set.npz"}}', '{"step 2": [1, 2]}']
SMALL = "--width 8 --mults 1 --attention --batch 4 --steps 2 --grid 2 --data set.npz".split()
TRAIN = ["--method", "ddpm", "--T", "30", "--device", "cpu", *SMALL]
RESUME = ["--method", "ddpm", "--out", "ddpm", "--resume", "--steps", "3", "--device", "cpu"]
COMMANDS = {
    "sample": (sample, ["ddpm", "--n", "2", "--steps", "2"]),
    "evaluate": (evaluate, ["ddpm", "--error", "--n", "2"]),
    "bound": (evaluate, ["ddpm", "--nll", "--n", "2", "--steps", "2"]),
    "frechet": (evaluate, "ddpm --frechet --features mean.pt --n 4 --steps 2".split()),
    "edit": (edit, ["ddpm", "vary", "a.png", "--n", "2", "--steps", "2"]),
    "held out": (edit, ["ddpm", "invert", "0", "--steps", "2"]),
    "resume": (train, RESUME),
}


class Mean(torch.nn.Module):
    """The features of the Frechet distance."""

    def forward(self, x):
        return x.float().mean(dim=[2, 3])


def kind(function):
    KINDS[function.__name__] = function
    return function


# What is spoiled


def damaged(dice, content):
    """The bytes of a file, cut, turned, lengthened or overwritten."""
    content = bytearray(content)
    at = dice.randrange(len(content) + 1)
    if dice.random() < 0.5:  # a header
        at = min(at, dice.randrange(200))
    length = dice.choice([1, 4, 100, 10**4])
    way = dice.randrange(6)
    if way == 0:
        return bytes(content[:at])
    if way == 1:
        del content[at : at + length]
    elif way == 2:
        content[at:at] = dice.randbytes(length)
    elif way == 3:
        content[at : at + length] = bytes(min(length, len(content) - at))
    else:
        for _ in range(dice.choice([1, 3, 30])):
            place = dice.randrange(min(at, len(content) - 1), len(content))
            content[place] ^= 1 << dice.randrange(8)
    return bytes(content)


def odd_value(dice):
    """What a checkpoint could hold where something else belongs."""
    tensors = [
        torch.zeros(1),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(3, requires_grad=True),
        torch.empty(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.tensor(float("nan")),
    ]
    numbers = [True, -1, 0, 1, 10**30, 10**400, 0.5, float("nan"), float("inf")]
    others = [None, "", "x", "a\nb", "\u00e9", b"x", [], {}, (), (1,), (1, "x"), [1], {1: 2}]
    return dice.choice(tensors + numbers + others)


def changed_tensor(dice, tensor):
    """The tensor with other numbers, of another type, place or layout."""
    ways = [
        lambda: tensor * float("nan"),
        lambda: tensor + 1,
        lambda: tensor.double(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to("meta"),
        lambda: tensor.clone().requires_grad_(tensor.is_floating_point()),
        lambda: tensor.new_zeros(()).expand(tensor.shape),
        lambda: tensor.flatten()[:1],
        lambda: tensor.mT if tensor.dim() > 1 else tensor,
        lambda: torch.nn.Parameter(tensor.float()),
    ]
    return dice.choice(ways)()


def mistype(dice, tree):
    """Change, lose or add one entry somewhere in a dict of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return
    key = dice.choice(keys)
    value = tree[key]
    if isinstance(value, (dict, list)) and value and dice.random() < 0.8:
        mistype(dice, value)
    elif torch.is_tensor(value) and dice.random() < 0.7:
        tree[key] = changed_tensor(dice, value)
    elif dice.random() < 0.2:
        del tree[key]
    elif dice.random() < 0.2 and isinstance(tree, dict):
        tree[dice.choice(["x", 3, (1,), "a\nb"])] = value
    else:
        tree[key] = odd_value(dice)


def spoil(dice, *paths):
    """Damage one of the files."""
    path = Path(dice.choice(paths))
    path.write_bytes(damaged(dice, path.read_bytes()))


# The kinds of input


@kind
def damaged_checkpoint(dice):
    spoil(dice, "ddpm/ckpt.pt")
    return COMMANDS[dice.choice(list(COMMANDS))]


@kind
def mistyped_checkpoint(dice):
    saved = torch.load("ddpm/ckpt.pt")
    for _ in range(dice.choice([1, 1, 1, 3])):
        mistype(dice, saved)
    with contextlib.suppress(Exception):  # a checksum that belongs to it
        saved["checksum"] = checkpoint.checksum(saved)
    torch.save(saved, "ddpm/ckpt.pt")
    return COMMANDS[dice.choice(list(COMMANDS))]


@kind
def image(dice):
    """A damaged image, or one of another format than its name says."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    picture = picture.convert(dice.choice("RGB L 1 P RGBA LA I I;16 F CMYK".split()))
    formats = "PNG JPEG WEBP BMP GIF TIFF PPM EPS ICO PCX TGA DDS SGI PDF".split()
    content = io.BytesIO()
    try:
        picture.save(content, dice.choice(formats))
    except (OSError, ValueError, KeyError):  # a mode that the format does not have
        picture.convert("L").save(content, "PNG")
    content = content.getvalue()
    if dice.random() < 0.8:
        content = damaged(dice, content)
    name = "z" + dice.choice(".png .jpg .webp .bmp .gif .tif .ppm".split())
    Path("images").mkdir()
    shutil.copy("a.png", "images")
    Path("images", name).write_bytes(content)
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.write("a.png")
        archive.writestr(name, content)
    word = f"images/{name}"
    return dice.choice(
        [
            (train, [*TRAIN, "--data", dice.choice(["images", "images.zip"])]),
            (edit, ["ddpm", "noise", word]),
            (edit, ["ddpm", "inpaint", "a.png", word, "--n", "1", "--steps", "2"]),
        ]
    )


@kind
def zip_of_images(dice):
    with zipfile.ZipFile("z.zip", "w", dice.choice([0, 8, 12, 14])) as archive:
        archive.write("a.png", "b/a.png")
        archive.write("a.png", dice.choice(ODD_NAMES))
    if dice.random() < 0.7:
        spoil(dice, "z.zip")
    return train, [*TRAIN, "--data", "z.zip"]


@kind
def arrays(dice):
    rng = np.random.default_rng(dice.randrange(2**32))
    dtype = dice.choice("u1 u1 f4 f8 f2 i8 i1 b1 c8 U3 M8[s] O V5".split())
    shapes = [(60, 3, 8, 8), (60, 8, 8), (60, 8, 8, 2), (0, 3, 8, 8), (1, 1, 8, 8), (), (9,)]
    images = rng.integers(0, 256, dice.choice(shapes)).astype("u1").astype(dtype)
    labels = rng.integers(-1, dice.choice([3, 10**4, 2**60]), dice.choice([60, 3, 0]))
    if dtype[0] == "f" and images.size:
        images.flat[0] = dice.choice([0, np.inf, np.nan, 1e4])
    name = dice.choice(["z.npy", "z.npz"])
    if name == "z.npy":
        np.save(name, images)
    else:
        np.savez(name, **{dice.choice(["x", "x_train", "a/b", "\n"]): images, "y": labels})
    if dice.random() < 0.5:
        spoil(dice, name)
    conditional = dice.choice([[], ["--conditional"]])
    other = evaluate, ["ddpm", "--error", "--n", "2", "--data", name]
    return dice.choice([(train, [*TRAIN, "--data", name, *conditional]), other])


@kind
def idx_files(dice):
    pack = dice.choice([gzip.compress, bytes])
    ending = ".gz" if pack is gzip.compress else ""
    count = dice.choice([0, 1, 60, 2**32 - 1])
    head = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes()
    images = head + bytes(min(count, 60) * 784)
    labels = bytes([0, 0, 8, 1]) + np.array([60], ">u4").tobytes() + dice.randbytes(60)
    paths = [f"train-{what}-ubyte{ending}" for what in ("images-idx3", "labels-idx1")]
    for path, content in zip(paths, (images, labels)):
        Path(path).write_bytes(pack(content))
    spoil(dice, *paths)
    return train, [*TRAIN, "--data", dice.choice([".", paths[0]])]


@kind
def cifar_files(dice):
    Path("data_batch_1.bin").write_bytes(dice.randbytes(3073 * 3))
    Path("batches.meta.txt").write_text("cat\ndog\n")
    spoil(dice, "data_batch_1.bin", "batches.meta.txt")
    names = [".", "data_batch_1.bin", "cifar-10-binary.tar.gz"]
    with tarfile.open(names[2], "w:gz") as archive:
        archive.add("data_batch_1.bin")
        archive.add("batches.meta.txt")
    if dice.random() < 0.5:
        spoil(dice, names[2])
    return train, [*TRAIN, "--data", dice.choice(names)]


@kind
def report(dice):
    Path("ddpm/evaluation").mkdir()
    path = Path("ddpm/evaluation/report.json")
    path.write_bytes(dice.choice(ODD_JSON).encode(errors="surrogatepass"))
    return COMMANDS["evaluate"]


@kind
def features(dice):
    if dice.random() < 0.5:
        extra = {"about.json": dice.choice(ODD_JSON).encode(errors="surrogatepass")}
        torch.jit.script(Mean()).save("mean.pt", _extra_files=extra)
    else:
        spoil(dice, "mean.pt")
    return COMMANDS["frechet"]


@kind
def values_of_flags(dice):
    """Odd values for some of a command's flags."""
    functions = dict(
        train=[train.train, UNet, checkpoint.METHODS["ddpm"]],
        sample=[sample.sample, checkpoint.METHODS["ddpm"].sample],
        euler=[sample.sample, ode_sample],
        evaluate=[evaluate.evaluate, checkpoint.METHODS["ddpm"].sample],
        edit=[edit.edit],
    )
    name = dice.choice(list(functions))
    command, argv = COMMANDS[name] if name in COMMANDS else (train, TRAIN)
    argv = list(argv)
    if name == "euler":
        command = sample
        argv = ["ddpm", "--n", "2", "--sampler", dice.choice(["heun", "euler", "churn"])]
    if name == "train":
        method = dice.choice(list(checkpoint.METHODS))
        argv = ["--method", method, *SMALL]
        functions["train"][2] = checkpoint.METHODS[method]
    if name == "edit":
        verb = dice.choice(list(edit.VERBS))
        argv = ["ddpm", verb, *dice.choices(["a.png", "0", "77"], k=dice.choice([1, 2]))]
        functions["edit"].append(edit.VERBS[verb])
    parameters = {}
    for function in functions[name]:
        parameters |= flags_of(function)
    for flag in dice.sample(sorted(parameters), dice.choice([1, 2, 4])):
        if flag != "compile":  # which takes minutes
            suits = re.search("int|float", str(parameters[flag].annotation))
            words = ODD_NUMBERS if suits and dice.random() < 0.9 else ODD_WORDS
            values = dice.choices(words, k=dice.choice([0, 1, 1, 1, 1, 1, 2]))
            argv += [f"--{flag.rstrip('_')}", *values]
    return command, argv


@kind
def paths(dice):
    """Odd paths, or other words, wherever a command takes a path."""
    path = dice.choice(ODD_PATHS)
    name = dice.choice(list(COMMANDS))
    command, argv = COMMANDS[name]
    argv = list(argv)
    if name == "resume" or dice.random() < 0.6:
        flag = dice.choice(["--out", "--out", "--data", "--features", "--compare"])
        return command, [*argv, flag, path]
    at = dice.choice([0, 0, 2]) if command is edit else 0
    argv[at] = path
    return command, argv


# One call


def make_folder(folder):
    """Every file that an input may spoil."""
    os.chdir(folder)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 8, 8), np.uint8)
    np.savez("set.npz", images=images, y=np.arange(60) % 3)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save("a.png")
    torch.jit.script(Mean()).save("mean.pt")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*TRAIN, "--out", "ddpm", "--conditional"])


def hashes(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def call(command, argv):
    """Exit code, lines on stderr and traceback ("" without one) of one call."""
    timer = threading.Timer(SECONDS, _thread.interrupt_main)
    timer.start()
    code, trace = 0, ""
    err = io.StringIO()
    try:
        sys.argv = [Path(command.__file__).name, *argv]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            flags.run(command.main)
    except SystemExit as stop:
        code = stop.code or 0
    except Exception:
        code, trace = 1, traceback.format_exc()
    timer.cancel()
    lines = [line for line in re.split(r"[\r\n]", err.getvalue()) if line.strip()]
    return code, [line for line in lines if not PROGRESS.search(line)], trace


def faults_of(command, argv):
    """The exit code of one call, and what it did that it must not: a list of words."""
    before = hashes(".")
    code, lines, trace = call(command, argv)
    after = hashes(".")
    faults = [f"traceback: {trace}"] if trace else []
    if code not in (0, 1, 2, 130):
        faults.append(f"exit code {code}")
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        faults.append(f"not one line: {lines}")
    changed = [path for path in before if after.get(path) != before[path]]
    if code in (0, 130):  # what a run writes again is its own; --out was named by the user
        own = "ddpm" + os.sep
        changed = [path for path in changed if path != argv[-1] and not path.startswith(own)]
    left = [path for path in after if path.endswith((".tmp", ".lock"))]
    if changed or left:
        faults.append(f"changed or gone: {changed}; left behind: {left}")
    return code, faults


def work(seed, first, n):
    """Make the inputs first, ..., first + n - 1; a line of JSON about each."""
    torch.set_num_threads(1)
    report = sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/good")
        make_folder(f"{folder}/good")
        for k in range(first, first + n):
            dice = random.Random(f"{seed} {k}")
            shutil.copytree(f"{folder}/good", f"{folder}/case/inner")
            os.chdir(f"{folder}/case/inner")
            name = dice.choice(list(KINDS))
            command, argv = KINDS[name](dice)
            code, faults = faults_of(command, argv)
            about = dict(k=k, kind=name, argv=argv, code=code, faults=faults)
            print(json.dumps(about), file=report, flush=True)
            os.chdir(folder)
            shutil.rmtree(f"{folder}/case")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.work:
        return work(asked.seed, asked.first, asked.n)
    codes, found = collections.Counter(), 0
    k, end = asked.first, asked.first + asked.n
    while k < end:
        numbers = ["--seed", str(asked.seed), "--first", str(k), "--n", str(end - k)]
        worker = [sys.executable, os.path.abspath(__file__), "--work", *numbers]
        with subprocess.Popen(worker, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                about = json.loads(line)
                k = about["k"] + 1
                codes[about["code"]] += 1
                if about["faults"]:
                    found += 1
                    print(f"{about['k']} {about['kind']}: {about['argv']}")
                    print("\n".join(about["faults"]), flush=True)
        if process.returncode:
            found += 1
            print(f"{k}: the process died with {process.returncode}")
            k += 1
    ends = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    print(f"seed {asked.seed}: {asked.n} inputs, {found} found; exit codes: {ends}")
    sys.exit(found > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
