import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import curves, images


def rows(*values):
    return [
        {"images": 100 * (k + 1), "loss": value, "rmse_1": value, "rmse_10": 2 * value}
        for k, value in enumerate(values)
    ]


def colours_of(path):
    return {colour for _, colour in Image.open(path).getcolors(10**6)}


def test_each_error_has_a_curve_of_its_own(tmp_path):
    path = tmp_path / "curves.png"
    curves.save_curves(rows(1.0, 0.5, 0.2), path)
    first, second = (tuple(bytes.fromhex(colour[1:])) for colour in curves.COLOURS[:2])
    picture = Image.open(path)
    assert picture.size == (2 * curves.WIDTH, curves.HEIGHT)
    assert {first, second} <= colours_of(path)
    left = np.asarray(picture)[:, : curves.WIDTH].reshape(-1, 3)
    assert (left == first).all(1).any()
    assert not (left == second).all(1).any()


def test_a_loss_that_falls_is_drawn_falling(tmp_path):
    path = tmp_path / "curves.png"
    curves.save_curves(rows(1.0, 0.1), path)
    panel = np.asarray(Image.open(path))[:, : curves.WIDTH]
    line = (panel == tuple(bytes.fromhex(curves.COLOURS[0][1:]))).all(2)
    down, across = np.nonzero(line)
    assert down[across.argmin()] < down[across.argmax()]


def test_a_single_row_and_a_loss_that_is_no_logarithm_are_drawn_too(tmp_path):
    curves.save_curves(rows(0.5), tmp_path / "one.png")
    curves.save_curves(rows(-0.5, 0.0), tmp_path / "negative.png")
    first = tuple(bytes.fromhex(curves.COLOURS[0][1:]))
    assert first in colours_of(tmp_path / "one.png")
    assert first not in colours_of(tmp_path / "negative.png")


@pytest.mark.parametrize(
    "odd", [dict(loss=float("inf"), rmse_1=float("nan")), dict(loss=1e308), dict(images=0)]
)
def test_a_row_that_no_axis_can_show_is_left_out_and_so_is_a_column_that_it_lacks(
    tmp_path, odd
):
    log = rows(1.0, 0.5)
    curves.save_curves(log, tmp_path / "expected.png")
    lacking = dict(images=150, loss=float("nan"))
    curves.save_curves([log[0], lacking | odd, log[1]], tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_progress_shows_the_first_row_of_every_grid_in_the_order_of_steps(tmp_path):
    grey = [0.5, -0.5, 0.0]
    for step, value in zip((1000, 500, 1500), grey):
        x = torch.full((4, 3, 8, 8), -1.0)
        x[:2] = value
        images.save_grid(x, tmp_path / f"{step:06d}.png")
    (tmp_path / "seed0.png").write_bytes(b"not a grid of the run")
    curves.save_progress(tmp_path, 2, tmp_path / "progress.png")
    picture = np.asarray(Image.open(tmp_path / "progress.png"))
    height = len(picture) // 3
    middles = picture[height // 2 :: height, curves.MARGIN + 20, 0]
    expected = images.to_uint8(torch.tensor([-0.5, 0.5, 0.0]))
    assert middles.tolist() == expected.tolist()
