"""The page of sample.py --html, read again: its frames, images and numbers."""
import base64
import functools
import io
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from conftest import linear_alpha_bar
from PIL import Image

import sample
from plumbing import checkpoint, images, page
from plumbing.device import seeded_noise
from plumbing.flags import UserError


class Frame(NamedTuple):
    pictures: np.ndarray  # (2n, H, W, 3) of integers: x of each image, then the estimates
    names: list  # of these
    numbers: dict  # {words: number as it is written}
    mark: tuple  # where the circle stands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs: ddpm, edm, classes (DDPM with three of them)."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_run(folder / "ddpm", "ddpm")
    tiny.write_run(folder / "edm", "edm")
    tiny.write_run(folder / "classes", "ddpm", classes=3)
    return folder


@pytest.fixture
def draw(runs, tmp_path, monkeypatch, capsys):
    """draw("ddpm --html a.html") -> (exit code, stdout, stderr), beside copies of the runs."""
    return functools.partial(tiny.beside(runs, tmp_path, monkeypatch, capsys), sample)


@pytest.fixture
def read(draw):
    """read("ddpm --n 2") -> {row's name: [Frame, ...]} of the page that it makes."""

    def read(line):
        code, _, err = draw(f"{line} --html page.html")
        assert code == 0, err
        sections = Path("page.html").read_text(encoding="utf-8").split("<section>")[1:]
        return {between(part, "<h2>", "</h2>")[0]: frames_of(part) for part in sections}

    return read


def between(text, start, end):
    return re.findall(f"{re.escape(start)}(.*?){re.escape(end)}", text, re.DOTALL)


def frames_of(section):
    frames = []
    for part in section.split('<div class="frame" hidden>')[1:]:
        coded = between(part, 'src="data:image/png;base64,', '"')
        files = [io.BytesIO(base64.b64decode(text)) for text in coded]
        pictures = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
        numbers = dict(zip(between(part, "<th>", "</th>"), between(part, "<td>", "</td>")))
        mark = (float(between(part, ' cx="', '"')[0]), float(between(part, ' cy="', '"')[0]))
        frames.append(Frame(pictures, between(part, 'alt="', '"'), numbers, mark))
    return frames


def number(frame, symbol):
    (found,) = [number for words, number in frame.numbers.items() if words.startswith(symbol)]
    return float(found)


def chain(run, n, **options):
    """A method's own chain, from noise on: [(x, x_0_hat), ...]."""
    method, saved = checkpoint.load(run)
    noise = seeded_noise([(0, i) for i in range(n)])
    x = noise(torch.empty(n, *saved["shape"]))
    states = []
    for x_next, x_0_hat in method.sample(x, randn_like=noise, **options):
        states.append((x, x_0_hat))
        x = x_next
    return [*states, (x, x)]


def pixels(x):
    return images.to_uint8(x).permute(0, 2, 3, 1).numpy().astype(int)


# Frames


@pytest.mark.parametrize("line, steps", [("ddpm --steps 5", 5), ("edm", 18), ("ddpm", 30)])
def test_a_page_has_a_frame_for_each_state_of_a_short_chain(read, line, steps):
    (frames,) = read(line).values()
    assert len(frames) == steps + 1
    for frame in frames:
        assert len(frame.pictures) == 2 * 6
    assert frames[0].names[1] == "x, image 1 of seed 0"
    assert frames[0].names[-1] == "estimate of x_0, image 5 of seed 0"


def test_a_long_chain_is_shown_in_at_most_61_frames_from_noise_to_sample(read):
    (frames,) = read("edm --n 1 --steps 150").values()
    shown = [number(frame, "i") for frame in frames]
    assert 30 <= len(frames) <= 61
    assert (shown[0], shown[-1]) == (0, 150)
    assert len(set(np.diff(shown)[:-1])) == 1


def test_the_pictures_are_the_chain_s_pixels(read):
    (frames,) = read("ddpm --n 3 --steps 6").values()
    states = chain("ddpm", 3, steps=6)
    sample, _ = states[-1]
    contrast = sample.std(dim=(1, 2, 3), keepdim=True).clamp(min=0.5)
    for frame, (x, x_0_hat) in zip(frames, states, strict=True):
        std = x.std(dim=(1, 2, 3), keepdim=True)
        seen = x * (contrast / std).clamp(max=1)
        assert np.abs(frame.pictures[:3] - pixels(seen)).max() <= 1
        assert np.abs(frame.pictures[3:] - pixels(x_0_hat)).max() <= 1


def test_the_last_frame_is_the_sample_twice_and_has_no_step(read, draw):
    (frames,) = read("edm --n 2 --steps 4").values()
    draw("edm --n 2 --steps 4 --out drawn")
    drawn = [np.asarray(Image.open(file)) for file in sorted(Path("drawn").iterdir())]
    assert np.abs(frames[-1].pictures - np.stack(drawn * 2)).max() <= 1
    assert number(frames[-1], "\u03c3<sub>i</sub>") == 0
    assert list(frames[-1].numbers.values())[2:] == ["&ndash;"] * 6


# Numbers


def test_the_numbers_of_a_chain_are_alpha_bar_sigma_and_the_weights_of_eq_7(read):
    (frames,) = read("ddpm --n 1").values()
    alpha_bar = linear_alpha_bar(30).tolist()
    for t, frame in zip(range(30, 0, -1), frames):
        here = alpha_bar[t]
        there = alpha_bar[t - 1]
        alpha = here / there
        expected = {
            "t": t,
            "s": t - 1,
            "\u03b1\u0304<sub>t</sub>": here,
            "\u03c3": ((1 - here) / here) ** 0.5,
            "a = ": there**0.5 * (1 - alpha) / (1 - here),
            "b = ": alpha**0.5 * (1 - there) / (1 - here),
        }
        for symbol, value in expected.items():
            assert number(frame, symbol) == pytest.approx(value, rel=1e-4), (t, symbol)


def test_the_numbers_of_a_solver_are_the_levels_and_the_weights_of_heun_s_step(read):
    (frames,) = read("edm --n 1 --steps 6").values()
    low = 0.002 ** (1 / 7)
    high = 80 ** (1 / 7)
    sigma = [(high + i / 5 * (low - high)) ** 7 for i in range(6)]
    for i in range(5):
        r = sigma[i + 1] / sigma[i]
        expected = {
            "i": i,
            "\u03c3<sub>i</sub>": sigma[i],
            "\u03c3<sub>i+1</sub>": sigma[i + 1],
            "r = ": r,
            "1 \u2212 r": 1 - r,
            "a = ": (1 - r) * (1 - 1 / (2 * r)),
            "b = ": (1 - r) / (2 * r),
        }
        for symbol, value in expected.items():
            assert number(frames[i], symbol) == pytest.approx(value, rel=1e-4), (i, symbol)


def test_the_curve_marks_each_state_at_its_level(read):
    (frames,) = read("ddpm --n 1").values()
    alpha_bar = linear_alpha_bar(30).tolist()
    for k, frame in enumerate(frames):
        share = (alpha_bar[30 - k] - alpha_bar[30]) / (1 - alpha_bar[30])
        assert frame.mark == pytest.approx((400 * k / 30, 100 - 100 * share), abs=0.06)


# Rows


def test_runs_stand_one_under_the_other_and_begin_at_the_same_noise(read):
    rows = read("ddpm --compare edm --n 2")
    assert {name: len(frames) for name, frames in rows.items()} == {"ddpm": 31, "edm": 19}
    noise = [frames[0].pictures[:2].ravel() for frames in rows.values()]  # but for contrast
    assert np.corrcoef(*noise)[0, 1] > 0.9
    assert 'max="30"' in Path("page.html").read_text(encoding="utf-8")


def test_classes_have_a_row_each(read):
    assert list(read("classes --class all --n 1 --steps 2")) == ["0", "1", "2"]


# The file


def test_a_page_needs_nothing_else(read):
    read("ddpm --n 2 --steps 3")
    text = Path("page.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert set(re.findall(r'\b(?:src|href)="(.{11})', text)) == {"data:image/"}
    assert not re.search(r"url\(|@import|<link|fetch\(|\$[a-z{]", text)


def test_a_run_s_name_is_no_part_of_the_page_s_code(draw):
    shutil.move("ddpm", "<b>&amp;")
    assert draw("<b>&amp; --n 1 --steps 2 --html page.html")[0] == 0
    assert "<h2>&lt;b&gt;&amp;amp;</h2>" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape, n", [((3, 32, 32), 6), ((3, 32, 32), 18), ((1, 64, 64), 8)])
def test_a_page_of_noise_has_as_many_frames_as_3_mb_hold(shape, n):
    most = page.most_frames(shape, n)
    uri = images.as_uri(torch.randint(0, 256, shape, dtype=torch.uint8))
    frame = 2 * n * len(uri)
    assert (most + 1) * frame < 3e6
    assert (most + 4) * frame > 2.9e6


def test_too_many_images_are_refused_with_their_number():
    with pytest.raises(UserError, match="of 40 images of 64x64 .* lower --n or --size"):
        page.most_frames((3, 64, 64), 40)


@pytest.mark.parametrize(
    "line, words",
    [
        ("ddpm --html page.txt", "--html page.txt must name a file that ends in .html"),
        ("ddpm --html ddpm", "--html ddpm must name a file"),
        ("ddpm --html ddpm/ckpt.pt/a.html", "cannot write in ddpm/ckpt.pt"),
        ("ddpm --html a.html --out b.png", "leave out --out"),
        ("ddpm --html a.html --gif", "--html and --gif do not go together"),
        ("ddpm --html a.html --strip", "--html and --strip do not go together"),
        ("ddpm --html a.html --class 0 1 --guidance 1 2", "do not go together"),
        ("ddpm --html a.html --n 500", "lower --n"),
        ("ddpm --html notes.html", "notes.html is there and is no page of sample.py"),
    ],
)
def test_a_mistake_is_one_error_line_and_writes_nothing(draw, line, words):
    Path("notes.html").write_text("<p>mine")
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    code, _, err = draw(line)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


def test_a_page_is_written_over_by_the_next_one_and_says_so(draw):
    line = "ddpm --n 1 --steps 2 --html page.html"
    assert "overwritten" not in draw(line)[1]
    code, out, _ = draw(line)
    assert code == 0
    assert "note: page.html is there already" in out
