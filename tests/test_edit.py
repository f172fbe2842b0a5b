import math

import numpy as np
import pytest
import torch
from conftest import Gaussian, closed_form, linear_alpha_bar
from PIL import Image
from test_sample import a_run, trained  # noqa: F401 (fixtures)
from test_train import do, pictures  # noqa: F401 (fixtures)

import edit
from ddpm import DDPM
from edm import EDM
from edit import inpaint, interpolate, vary

ab = linear_alpha_bar()


class Pair:
    """The exact denoiser of two pixels with standard deviation s and correlation r."""
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, s=0.5, r=0.9):
        self.C = s ** 2 * torch.tensor([[1, r], [r, 1]], dtype=torch.float64)

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, y=None):
        gain = self.C @ torch.linalg.inv(self.C + sigma ** 2 * torch.eye(2, dtype=torch.float64))
        return (x.flatten(1) @ gain.T).view_as(x)


def test_inpainting_keeps_known_pixels_exactly_and_draws_the_rest_from_the_conditional_distribution():
    n, known = 4000, 0.7
    x_0, mask = torch.tensor([known, -5.0], dtype=torch.float64).view(1, 1, 1, 2), torch.tensor([False, True]).view(1, 1, 1, 2)
    x = inpaint(Pair(), x_0, mask, torch.randn_like, None, 40, 10, n)
    assert x.shape == (n, 1, 1, 2) and (x[..., 0] == known).all()
    drawn, spread = x[..., 1].flatten(), 0.5 * math.sqrt(1 - 0.81)
    assert abs(drawn.mean() - 0.9 * known) < 0.05 and abs(drawn.std() - spread) < 0.05        # the step is finite: no closer
    once = inpaint(Pair(), x_0, mask, torch.randn_like, None, 40, 1, n)[..., 1].flatten()
    assert abs(once.mean() - 0.9 * known) > 2 * abs(drawn.mean() - 0.9 * known)              # what --resample is for


def test_inpainting_shows_the_denoiser_the_known_part_under_noise_of_its_own_level():
    seen = []
    class Watched(Pair):
        def __call__(self, x, sigma, y=None):
            seen.append(((x[..., 0] - 0.7).std() / sigma).item())
            return super().__call__(x, sigma)
    x_0, mask = torch.tensor([0.7, 0.0], dtype=torch.float64).view(1, 1, 1, 2), torch.tensor([False, True]).view(1, 1, 1, 2)
    inpaint(Watched(), x_0, mask, torch.randn_like, None, 6, 3, 20_000)
    assert len(seen) == 5 * 3 + 1 and max(abs(s - 1) for s in seen) < 5 / math.sqrt(2 * 20_000)


def exact(kind):
    data = Gaussian(0.1, 0.3)
    if kind == "ddpm":
        return data, DDPM(closed_form(lambda x, t, y: data.eps(x, ab[t.long()])), 1, clip=False)
    method = EDM(closed_form(lambda x, c, y: x), 1)
    method.D = lambda x, sigma, y=None: (data.s ** 2 * x + sigma ** 2 * data.mu) / (data.s ** 2 + sigma ** 2)
    method.__class__ = type("Exact", (EDM,), {"forward": lambda self, x, sigma, y=None: self.D(x, sigma, y)})
    return data, method


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_interpolation_in_latent_space_starts_at_one_image_and_ends_at_the_other(kind):
    _, method = exact(kind)
    a, b = torch.randn(2, 1, 1, 4, 4).double() * 0.3
    x = interpolate(method, a, b, 0.5, True, 0, None, 80, 5)
    assert x.shape == (5, 1, 4, 4) and (x[0] - a[0]).abs().max() < 0.03 and (x[-1] - b[0]).abs().max() < 0.03
    steps = x.diff(dim=0).flatten(1).norm(dim=1)
    assert steps.max() < 2 * steps.min()


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_interpolation_through_a_little_noise_starts_near_one_image_and_ends_near_the_other(kind):
    _, method = exact(kind)
    a, b = torch.randn(2, 1, 1, 4, 4).double() * 0.3
    x = interpolate(method, a, b, 0.02, False, 0, None, 20, 3)
    assert (x[0] - a[0]).abs().max() < 0.35 and (x[-1] - b[0]).abs().max() < 0.35 and (x[1] - (a[0] + b[0]) / 2).abs().max() < 0.35


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_variations_share_what_the_noise_leaves_of_the_image_and_nothing_at_full_noise(kind):
    data, method = exact(kind)
    x_0 = torch.full((1, 1, 1, 1), 0.9).double()
    spread = []
    for at in (0.1, 0.4, 1.0):
        x = vary(method, x_0, at, torch.randn_like, 3, None, 60, 3000)
        sigma = edit.level_at(method, at)
        left = (1 / (1 / data.s ** 2 + 1 / sigma ** 2)) ** 0.5                              # of the posterior
        assert abs(x.std() - left) < 0.1 * left + 0.01
        spread.append(x.std())
    assert spread[0] < spread[1] <= spread[2] + 0.02 and abs(x.mean() - data.mu) < 0.06


@pytest.fixture
def run(do, trained, tmp_path):
    a_run(do, trained, tmp_path, "plain", "--method pdm --patch 2 --steps 2 --lr 0.01 --warmup 0")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 20), np.uint8)).save(tmp_path / "gray.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).resize((8, 8)).save(tmp_path / "small.png")
    Image.fromarray(0 * mask).save(tmp_path / "black.png")
    return do


@pytest.mark.parametrize("line, size, words", [
    ("noise a.png", (8, 2), "wrote"), ("noise 2", (8, 2), ""), ("inpaint a.png mask.png --n 7 --steps 3 --resample 2", (3, 3), ""),
    ("inpaint gray.png small.png --n 2 --steps 3", (2, 2), "note: the mask is 8x8"), ("invert a.png --steps 4", (3, 1), "reconstructed"),
    ("interpolate a.png gray.png --n 3 --steps 4", (5, 1), "note: gray.png is 20x40"), ("interpolate 0 1 --latent --n 3 --steps 4", (5, 1), ""),
    ("vary a.png --at 0.3 --n 3 --steps 4", (2, 2), "network evaluations")])
def test_each_verb_writes_its_picture(run, tmp_path, line, size, words):
    code, out, err = run(edit, f"run/ckpt.pt {line} --device cpu --out o.png")
    assert code == 0 and words in out and "network evaluations" in out, err
    zoom = -(-512 // (size[0] * 16))
    width, height = Image.open(tmp_path / "o.png").size
    assert 0 <= width - (size[0] * (16 * zoom + 2) + 2) < 60 and height == size[1] * (16 * zoom + 2) + 2
    if "inpaint a.png" in line:
        shown = np.asarray(Image.open(tmp_path / "o.png")).astype(int)
        cell = lambda r, c: shown[2 + r * (16 * zoom + 2):, 2 + c * (16 * zoom + 2):][:16 * zoom:zoom, :16 * zoom:zoom]
        original = np.asarray(Image.open(tmp_path / "a.png"))
        assert all((cell(r, c)[:, :8] == original[:, :8]).all() for r in range(3) for c in range(3))
        assert (cell(0, 2)[:, 8:] != original[:, 8:]).mean() > 0.5 and (cell(0, 2) != cell(1, 0)).any()
    if "invert" in line:
        assert np.load(tmp_path / "o.npy").shape == (1, 3, 16, 16)


@pytest.mark.parametrize("line, words", [
    ("noise", "one image"), ("noise a.png a.png", "one image"), ("inpaint a.png", "an image and a mask"), ("noise nothing.png", "cannot read nothing.png"),
    ("noise set.npz", "cannot read"), ("noise 77", "held out"), ("inpaint a.png black.png", "all black"), ("vary a.png --at 2", "--at"),
    ("noise a.png --resample 3", "--resample goes with inpaint"), ("vary a.png --latent", "--latent goes with interpolate"), ("vary a.png --class 1", "--conditional"),
    ("vary a.png --guidance 2", "--conditional"), ("vary a.png --out a.jpg", ".png"), ("blur a.png", "blur"), ("vary a.png --nn 3", "no such flag")])
def test_a_mistake_in_editing_is_one_line_and_exit_code_2(run, tmp_path, line, words):
    code, out, err = run(edit, f"run/ckpt.pt {line} --device cpu")
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1 and words in err and not list((tmp_path / "run/samples").glob("[a-z]*.png"))
