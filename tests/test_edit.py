import functools
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import Gaussian, closed_form, linear_alpha_bar
from PIL import Image

import edit
from ddpm import DDPM

ALPHA_BAR = linear_alpha_bar()


class Pair:
    """The exact denoiser of two pixels with standard deviation s and correlation r."""

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, s=0.5, r=0.9):
        self.covariance = s**2 * torch.tensor([[1, r], [r, 1]], dtype=torch.float64)

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, y=None):
        noise = sigma**2 * torch.eye(2, dtype=torch.float64)
        gain = self.covariance @ torch.linalg.inv(self.covariance + noise)
        return (x.flatten(1) @ gain.T).view_as(x)


class ExactD(torch.nn.Module):
    """A method of the D kind, whose D is exact for independent Gaussian pixels."""

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, data):
        super().__init__()
        self.data = data

    def round_sigma(self, sigma):
        return sigma

    def D(self, x, sigma, y=None):
        s, mu = self.data.s, self.data.mu
        return (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)


def exact(kind):
    data = Gaussian(0.1, 0.3)
    if kind == "chain":
        net = closed_form(lambda x, t, y: data.eps(x, ALPHA_BAR[t.long()]))
        return data, DDPM(net, 1, clip=False)
    return data, ExactD(data)


KINDS = ["chain", "D"]


def two_images():
    return list(torch.randn(2, 1, 1, 4, 4).double() * 0.3)


# Inpainting


def known_and_hidden(n, value=0.7):
    x_0 = torch.tensor([value, -5.0], dtype=torch.float64).view(1, 1, 1, 2)
    return x_0.expand(n, -1, -1, -1), torch.tensor([False, True]).view(1, 1, 1, 2)


def test_inpainting_keeps_known_pixels_exactly_and_draws_the_rest_from_what_they_leave():
    x_0, hidden = known_and_hidden(4000)
    x = edit.fill_in(Pair(), x_0, hidden, None, 40, 10, torch.randn_like)
    assert (x[..., 0] == 0.7).all()
    drawn = x[..., 1]
    assert abs(drawn.mean() - 0.9 * 0.7) < 0.05  # the steps are finite: no closer
    assert abs(drawn.std() - 0.5 * math.sqrt(1 - 0.81)) < 0.05


def test_resampling_brings_both_parts_to_agree():
    x_0, hidden = known_and_hidden(4000)
    error = {}
    for resample in (1, 10):
        x = edit.fill_in(Pair(), x_0, hidden, None, 40, resample, torch.randn_like)
        error[resample] = abs(x[..., 1].mean() - 0.9 * 0.7)
    assert error[1] > 2 * error[10]


def test_inpainting_shows_the_denoiser_the_known_part_under_noise_of_its_own_level():
    spread = []

    class Watched(Pair):
        def __call__(self, x, sigma, y=None):
            spread.append(((x[..., 0] - 0.7).std() / sigma).item())
            return super().__call__(x, sigma)

    x_0, hidden = known_and_hidden(20_000)
    edit.fill_in(Watched(), x_0, hidden, None, 6, 3, torch.randn_like)
    assert len(spread) == 5 * 3 + 1
    assert max(abs(s - 1) for s in spread) < 5 / math.sqrt(2 * 20_000)


@pytest.mark.parametrize(
    "name, corner, share",
    [
        ("lower", (7, 0), 1 / 2),
        ("upper", (0, 7), 1 / 2),
        ("left", (7, 0), 1 / 2),
        ("right", (0, 7), 1 / 2),
        ("center", (4, 4), 1 / 4),
    ],
)
def test_a_mask_s_name_says_what_is_drawn_anew(name, corner, share):
    hidden = edit.part_of(torch.zeros(1, 3, 8, 8), name)
    assert hidden.shape == (1, 1, 8, 8)
    assert hidden[0, 0][corner]
    assert hidden.double().mean() == share
    opposite = (7 - corner[0], 7 - corner[1])
    assert hidden[0, 0][opposite] == (name == "center")


# Latents and noise


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_inverted_comes_back(kind):
    _, method = exact(kind)
    x_0 = two_images()[:1]
    picture = edit.invert(method, x_0, None, 0, steps=80)
    assert picture.latent.shape == x_0[0].shape
    assert (picture.images[2] - x_0[0]).abs().max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_between_latents_goes_from_one_image_to_the_other_evenly(kind):
    data, method = exact(kind)
    a, b = two_images()
    # Latents of one length, between which the way is an arc
    b = data.mu + (b - data.mu) * (a - data.mu).norm() / (b - data.mu).norm()
    picture = edit.interpolate(method, [a, b], None, 0, latent=True, n=5, steps=80)
    x = picture.images[1:-1]
    assert x.shape == (5, 1, 4, 4)
    assert (x[0] - a[0]).abs().max() < 0.03
    assert (x[-1] - b[0]).abs().max() < 0.03
    moves = x.diff(dim=0).flatten(1).norm(dim=1)
    assert moves.max() < 2 * moves.min()


@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_through_a_little_noise_stays_near_the_images(kind):
    _, method = exact(kind)
    a, b = two_images()
    picture = edit.interpolate(method, [a, b], None, 0, at=0.02, n=3, steps=20)
    expected = torch.cat([a, (a + b) / 2, b])
    assert (picture.images[1:-1] - expected).abs().max() < 0.35


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0.1, 0.4, 1.0])
def test_variations_spread_as_the_posterior_given_the_noisy_image(kind, at):
    data, method = exact(kind)
    x_0 = torch.full((1, 1, 8, 8), 0.9).double()
    picture = edit.vary(method, [x_0], None, 3, at=at, n=40, steps=40)
    sigma, _ = edit.way_back(method, at, 40)
    posterior = (1 / (1 / data.s**2 + 1 / sigma**2)) ** 0.5
    x = picture.images[1:]
    spread = x.var(dim=0).mean().sqrt()  # of each pixel round its own mean
    assert abs(spread - posterior) < 0.1 * posterior + 0.01
    if at == 1.0:
        assert abs(x.mean() - data.mu) < 0.06  # nothing is left of the image


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_starts_deeper_in_the_noise_the_larger_at_is(kind):
    _, method = exact(kind)
    sigmas = [edit.way_back(method, at, 10)[0] for at in (0.001, 0.2, 0.5, 0.9, 1.0)]
    assert sigmas == sorted(set(sigmas))
    assert sigmas[-1] > 50


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_set(folder / "set.npz")
    tiny.write_run(folder / "run", "pdm", patch=(2,))
    tiny.write_run(folder / "classes", "edm", classes=3)
    random = np.random.default_rng(1)
    Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 256, (40, 20), np.uint8)).save(folder / "gray.png")
    mask = np.zeros((8, 8), np.uint8)
    Image.fromarray(mask).save(folder / "black.png")
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask).resize((4, 4)).save(folder / "small.png")
    return folder


@pytest.fixture
def change(runs, tmp_path, monkeypatch, capsys):
    """change("run noise a.png") -> (exit code, stdout, stderr)."""
    return functools.partial(tiny.beside(runs, tmp_path, monkeypatch, capsys), edit)


def cells(path, columns):
    """The images of a picture, {(row, column): (8, 8, 3)}."""
    shown = np.asarray(Image.open(path)).astype(int)
    side = 8 * math.ceil(512 / (columns * 8))
    rows = (shown.shape[0] - 2) // (side + 2)
    by_place = {}
    for row in range(rows):
        for column in range(columns):
            top, left = 2 + row * (side + 2), 2 + column * (side + 2)
            cell = shown[top : top + side, left : left + side]
            by_place[row, column] = cell[:: side // 8, :: side // 8]
    return by_place


@pytest.mark.parametrize("run", ["run", "classes"])
@pytest.mark.parametrize(
    "line, columns, rows, words",
    [
        ("noise a.png", 8, 2, "1 image, 8 network evaluations"),
        ("noise 2", 8, 2, "wrote"),
        ("inpaint a.png mask.png --n 7 --steps 3 --resample 2", 3, 3, "5 network evaluations"),
        ("inpaint gray.png small.png --n 2 --steps 3", 2, 2, "note: the mask is 4x4"),
        ("inpaint a.png --mask lower --n 2 --steps 3", 2, 2, "wrote"),
        ("invert a.png --steps 4", 3, 1, "reconstructed"),
        ("interpolate a.png gray.png --n 3 --steps 4", 5, 1, "note: gray.png is 20x40"),
        ("interpolate 0 1 --latent --n 3 --steps 4", 5, 1, "network evaluations"),
        ("vary a.png --at 0.3 --n 3 --steps 4", 2, 2, "3 images"),
    ],
)
def test_each_verb_writes_its_picture(change, run, line, columns, rows, words):
    code, out, err = change(f"{run} {line} --device cpu --out o.png")
    assert code == 0, err
    assert words in out
    side = 8 * math.ceil(512 / (columns * 8))
    width, height = Image.open("o.png").size
    assert 0 <= width - (columns * (side + 2) + 2) < 60
    assert height == rows * (side + 2) + 2


def test_an_inpainted_picture_differs_from_the_image_under_the_mask_alone(change):
    change("run inpaint a.png mask.png --n 7 --steps 3 --out o.png")
    original = np.asarray(Image.open("a.png"))
    shown = cells("o.png", 3)
    for cell in shown.values():
        assert (cell[:, :4] == original[:, :4]).all()
    assert (shown[0, 2][:, 4:] != original[:, 4:]).mean() > 0.5
    assert (shown[0, 2] != shown[1, 0]).any()


def test_inversion_keeps_the_latent_beside_the_picture(change):
    assert change("run invert a.png --steps 4 --out o.png")[0] == 0
    assert np.load("o.npy").shape == (1, 3, 8, 8)


def test_a_default_name_tells_verb_images_and_flags_and_the_same_command_overwrites_it(change):
    for seed in (0, 0, 1):
        change(f"run vary a.png --at 0.3 --n 2 --steps 4 --seed {seed}")
    names = sorted(path.name for path in Path("run/samples").iterdir())
    assert names == [f"step000003-vary-a.png-seed{k}-at0.3-n2-steps4.png" for k in (0, 1)]


def test_a_class_guides_the_picture_with_the_weight_that_is_printed(change):
    drawn = []
    for flags in ("", "--class 1", "--class 2", "--class 1 --guidance 3"):
        code, out, err = change(f"classes vary a.png --n 2 --steps 4 {flags} --out o.png")
        assert code == 0, err
        drawn.append(Path("o.png").read_bytes())
        assert ("guidance" in out) == (flags != "")
    assert "guidance 3" in out
    assert len(set(drawn)) == 4


def test_every_verb_has_its_own_help(change):
    code, out, _ = change("run inpaint --help")
    assert code == 0
    assert "--mask" in out and "--resample" in out and "--seed" in out
    assert "--latent" not in out
    assert "--latent" in change("run interpolate --help")[1]
    for verb in edit.VERBS:
        assert verb in change("--help")[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("noise", "one image"),
        ("noise a.png a.png", "one image"),
        ("inpaint a.png", "--mask lower"),
        ("inpaint a.png mask.png --mask lower", "--mask lower"),
        ("inpaint --mask lower", "--mask lower"),
        ("inpaint a.png --mask middle", "center"),
        ("interpolate a.png", "two images"),
        ("noise nothing.png", "cannot read nothing.png"),
        ("noise set.npz", "cannot read"),
        ("noise 77", "held out"),
        ("inpaint a.png black.png", "all black"),
        ("vary a.png --at 2", "--at"),
        ("vary a.png --at nan", "--at"),
        ("vary a.png --steps 1", "--steps"),
        ("vary a.png --steps 100000000000000000000", "--steps"),
        ("vary a.png --n 0", "--n"),
        ("vary a.png --n 100000000000000000000", "--n"),
        ("noise a.png --seed -1", "--seed"),
        ("noise a.png --resample 3", "--resample goes with inpaint"),
        ("vary a.png --latent", "--latent goes with interpolate"),
        ("vary a.png --class 1", "--conditional"),
        ("vary a.png --guidance 2", "--conditional"),
        ("vary a.png --out a.jpg", ".png"),
        ("invert a.png --out .", ".png"),
        ("blur a.png", "blur"),
        ("vary a.png --nn 3", "no such flag"),
    ],
)
def test_a_mistake_in_editing_is_one_line_and_writes_nothing(
    runs, monkeypatch, capsys, line, words
):
    monkeypatch.chdir(runs)
    tiny.Command(monkeypatch, capsys).refuses(edit, f"run {line} --device cpu", words)


def test_guidance_needs_a_class_to_guide_to(change):
    code, _, err = change("classes vary a.png --guidance 2")
    assert code == 2
    assert "--class" in err
