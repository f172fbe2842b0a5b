"""The example of docs/add_a_paper.md, in a copy of the project, through every command."""
import contextlib
import importlib
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

HERE = Path(__file__).parent.parent
TRAIN = (
    "train --method {} --out {} --steps {} --data set.npz --conditional --width 8 --mults 1 "
    "--batch 8 --grid 1 --device cpu"
)
# What is done with the example, by name; each line is a command's name and its words.
COMMANDS = {
    "whole": TRAIN.format("rectified_flow", "whole", 4),
    "half": TRAIN.format("rectified_flow", "run", 2) + " --every 2",
    "resumed": "train --method rectified_flow --out run --resume --steps 4",
    "help": "sample run --help",
    "own": "sample run --n 2 --steps 3 --out own.png",
    "heun": "sample run --n 2 --steps 3 --sampler heun --out heun.png",
    "churn": "sample run --n 2 --steps 3 --sampler churn --out churn.png",
    "strip": "sample run --steps 3 --strip --out strip.png",
    "class": "sample run --n 2 --steps 3 --class 1 --guidance 2 --out class.png",
    "no-clip": "sample run --n 2 --steps 3 --no-clip --out no-clip.png",
    "size": "sample run --n 2 --steps 3 --size 8 12 --out size.png",
    "evaluate": "evaluate run --error --nearest --n 3 --steps 3",
    "noise": "edit run noise 0 --out noise.png",
    "inpaint": "edit run inpaint 0 --mask lower --steps 3 --n 2 --out inpaint.png",
    "invert": "edit run invert 0 --steps 3 --out invert.png",
    "interpolate": "edit run interpolate 0 1 --steps 3 --n 2 --out interpolate.png",
    "latent": "edit run interpolate 0 1 --latent --steps 3 --n 2 --out latent.png",
    "vary": "edit run vary 0 --steps 3 --n 2 --class 1 --out vary.png",
    # What goes wrong
    "nll": "evaluate run --nll",
    "steps": "sample run --steps 0",
}
# A mistake in the example: (what it says, what it should not say, what the error names)
FAULTS = {
    "no sampler": ("def sample(", "def samples(", "no sample("),
    "a sampler that yields nothing": ("yield x, x_0_hat", "if False: yield", "sample("),
    "a sampler that yields x alone": ("yield x, x_0_hat", "yield x", "sample("),
    "a sampler without its noise": ("        randn_like=torch.randn_like,\n", "", "randn_like"),
    "a loss for each image": (".square().mean()", ".square().mean((1, 2, 3))", "loss(x, y)"),
    "no denoiser": ("def D(", "def denoise(", "no D(x, sigma, y)"),
    "no range of levels": ("sigma_max = math.inf", "pass", "no sigma_max"),
    "a denoiser of another shape": (", y)).to(x.dtype)", ", y)).mean(1)", "shape of x"),
}


def example():
    text = (HERE / "docs/add_a_paper.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def run_in_copy(folder, papers, commands):
    """{name: what it printed} of commands in a copy of the project with more papers.

    papers: {key of METHODS: (class, source)}.
    """
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(HERE / "plumbing", folder / "plumbing", dirs_exist_ok=True)
    listing = folder / "plumbing/checkpoint.py"
    text = listing.read_text(encoding="utf-8")
    for key, (name, source) in papers.items():
        (folder / f"{key}.py").write_text(source, encoding="utf-8")
        start = f'from {key} import {name}\n\nMETHODS = {{\n    "{key}": {name},'
        text = text.replace("METHODS = {", start)
    listing.write_text(text, encoding="utf-8")
    tiny.write_set(folder / "set.npz")
    with pytest.MonkeyPatch.context() as patch, imported_from(folder):
        patch.chdir(folder)
        return {name: run(*line.split()) for name, line in commands.items()}


@contextlib.contextmanager
def imported_from(folder):
    """While it is open, the project's modules are imported anew, from a copy in this folder."""
    names = {file.stem for file in folder.glob("*.py")} | {"plumbing"}
    kept = {name: sys.modules[name] for name in of_project(names)}
    forget(kept)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget(of_project(names))
        sys.modules.update(kept)


def of_project(names):
    """The modules that are imported of files and packages with these names."""
    return [name for name in sys.modules if name.partition(".")[0] in names]


def forget(names):
    for name in names:
        del sys.modules[name]


def run(command, *argv):
    """What a command prints, and in the end "done", or the error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            importlib.import_module(command).main(argv)
            print("done")
        except SystemExit:
            print("done")
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return tmp_path_factory.mktemp("copy")


@pytest.fixture(scope="module")
def printed(copy):
    papers = dict(rectified_flow=("RectifiedFlow", example()))
    commands = dict(COMMANDS)
    for number, (name, (old, new, _)) in enumerate(FAULTS.items()):
        assert example().count(old) == 1, f"the example has changed: {old}"
        source = example().replace(old, new).replace("RectifiedFlow", f"Faulty{number}")
        papers[f"faulty{number}"] = (f"Faulty{number}", source)
        commands[name] = TRAIN.format(f"faulty{number}", f"faulty{number}", 2)
    return run_in_copy(copy, papers, commands)


def test_the_example_is_as_short_as_the_page_says_and_in_96_columns():
    lines = example().splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) <= 96


def test_a_sixth_paper_is_one_file_and_one_line_and_every_command_serves_it(printed):
    good = list(COMMANDS)[: list(COMMANDS).index("nll")]
    failed = {name: printed[name] for name in good if not printed[name].endswith("done\n")}
    assert not failed


def test_its_run_resumes_bit_for_bit(printed, copy):
    whole = torch.load(copy / "whole/ckpt.pt", weights_only=True)
    resumed = torch.load(copy / "run/ckpt.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == 4
    for part in ("model", "ema"):
        for name, weight in whole[part].items():
            assert torch.equal(weight, resumed[part][name]), name


def test_its_flags_are_in_the_help(printed):
    assert "Euler steps from t = 1 to 0 [50]" in printed["help"]


def test_its_samplers_draw_different_pictures(printed, copy):
    names = ("own", "heun", "churn", "class", "no-clip")
    pictures = {np.asarray(Image.open(copy / f"{name}.png")).tobytes() for name in names}
    assert len(pictures) == len(names)


def test_its_errors_are_one_line(printed):
    assert "UserError: " in printed["nll"] and "no variational bound" in printed["nll"]
    assert printed["steps"].startswith("UserError: ")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_method_fails_before_the_first_step_in_a_line_that_names(printed, copy, fault):
    last = printed[fault].strip().splitlines()[-1]
    assert last.startswith("UserError: ")
    assert FAULTS[fault][2] in last
    assert not (copy / f"faulty{list(FAULTS).index(fault)}").exists()
