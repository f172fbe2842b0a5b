import inspect
import math

import pytest
import torch
from conftest import close, closed_form, last, tensor

from edm import EDM, denoiser, ode_sample
from patch_diffusion import PatchDiffusion, coordinates, patch_sizes, progressive_size, random_crop
from unet import Guided


def spy(seen, out=lambda x: torch.zeros_like(x[:, :-2])):
    return closed_form(lambda x, c, y: seen.append((x, y)) or out(x))


# Coordinates

@pytest.mark.parametrize("H, W", [(32, 32), (28, 28), (7, 12), (96, 64)])
def test_the_corners_are_exactly_minus_1_and_1_and_x_comes_first(H, W):
    u = coordinates(H, W)
    assert u.shape == (2, H, W)
    assert u[:, 0, 0].tolist() == [-1, -1] and u[:, 0, -1].tolist() == [1, -1] and u[:, -1, 0].tolist() == [-1, 1] and u[:, -1, -1].tolist() == [1, 1]
    close(u[0, 3], [2 * k / (W - 1) - 1 for k in range(W)], atol=1e-6)
    close(u[1, :, 3], [2 * k / (H - 1) - 1 for k in range(H)], atol=1e-6)


def test_past_the_image_coordinates_go_on_and_within_it_they_are_the_same():
    close(coordinates(12, 20, (6, 10))[:, :6, :10], coordinates(6, 10), atol=1e-6)
    close(coordinates(12, 20, (6, 10))[:, 11, 19], [2 * 19 / 9 - 1, 2 * 11 / 5 - 1], rtol=1e-6)


def test_one_pixel_lies_somewhere():
    assert coordinates(1, 1).isfinite().all()
    assert coordinates(2, 2).tolist() == [[[-1, 1], [-1, 1]], [[-1, -1], [1, 1]]]


# Crops

@pytest.mark.parametrize("H, W, s", [(16, 16, 4), (8, 12, (4, 6)), (12, 8, 8), (8, 8, 8)])
def test_a_crop_is_a_window_of_the_image_not_resized_and_its_coordinates_that_window_of_the_grid(H, W, s):
    x = torch.arange(H * W).float().expand(64, 2, -1).reshape(64, 2, H, W).clone()  # each pixel its own number
    h, w = s if isinstance(s, tuple) else (s, s)
    crop, coords = random_crop(x, s)
    assert crop.shape == coords.shape == (64, 2, h, w)
    for i in range(64):
        top, left = divmod(int(crop[i, 0, 0, 0]), W)
        assert torch.equal(crop[i], x[i, :, top:top + h, left:left + w])
        close(coords[i], coordinates(H, W)[:, top:top + h, left:left + w], atol=1e-6)


def test_each_image_has_its_own_place_and_every_place_is_equally_likely():
    B, places = 20_000, 5 * 3
    crop, _ = random_crop(torch.arange(6 * 8).float().view(1, 1, 6, 8).expand(B, 1, 6, 8), (4, 4))
    top, left = crop[:, 0, 0, 0].long() // 8, crop[:, 0, 0, 0].long() % 8
    count = (top * 5 + left).bincount(minlength=places)
    assert len(count) == places and (count - B / places).abs().max() < 5 * (B / places) ** 0.5


def test_a_crop_may_be_a_single_pixel():
    x = torch.randn(3, 2, 4, 4)
    crop, coords = random_crop(x, (1, 1))
    assert crop.shape == coords.shape == (3, 2, 1, 1) and all((crop[k].flatten() == x[k].flatten(1).T).all(1).any() for k in range(3))


@pytest.mark.parametrize("s", [9, (4, 9), (9, 4), 0, (0, 4), (4, 0)])
def test_a_crop_larger_than_the_image_is_refused(s):
    with pytest.raises(ValueError):
        random_crop(torch.zeros(1, 1, 8, 8), s)


# Sizes: Eq. 5

@pytest.mark.parametrize("R", [28, 32, 48, 64, 96, 128])
def test_the_shares_are_p_three_fifths_and_two_fifths_of_the_rest(R):
    for p in (0, 0.1, 0.5, 1):
        sizes = patch_sizes(R, p)
        assert list(sizes) == [R, R // 2, R // 4]
        close(list(sizes.values()), [p, 0.6 * (1 - p), 0.4 * (1 - p)], atol=1e-12)
    close(list(patch_sizes(R, 0.3, quarter=False).values()), [0.3, 0.7])


def test_a_size_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        patch_sizes(30, 0.5)
    with pytest.raises(ValueError, match="divisible by 2"):
        patch_sizes(31, 0.5, quarter=False)
    assert patch_sizes(30, 0.5, quarter=False)[15] == 0.5 and patch_sizes(30, 1.0)[30] == 1


def test_stochastic_sizes_come_with_their_shares():
    model = PatchDiffusion(spy([]), 1, p_full=0.3)
    drawn = [model.draw_size(32, 0.0) for _ in range(4000)]
    for size, p in {32: 0.3, 16: 0.42, 8: 0.28}.items():
        assert abs(drawn.count(size) / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5


def test_progressive_sizes_grow_and_keep_their_shares():
    drawn = [progressive_size(64, 0.5, (k + 0.5) / 1000) for k in range(1000)]
    assert drawn == sorted(drawn) and [drawn.count(s) for s in (16, 32, 64)] == [200, 300, 500]
    assert progressive_size(64, 0.0, 0.4) == 32 and progressive_size(64, 0.5, 1.0) == 64 and progressive_size(64, 0.5, 0.0, quarter=False) == 32
    model = PatchDiffusion(spy([]), 1, sizes="progressive")
    assert [model.draw_size(64, progress) for progress in (0.1, 0.3, 0.7)] == [16, 32, 64]


def test_the_defaults_are_the_paper_s():
    defaults = {name: p.default for name, p in inspect.signature(PatchDiffusion).parameters.items()}
    assert defaults.items() >= dict(p_full=0.5, sizes="stochastic", sigma_data=0.5, P_mean=-1.2, P_std=1.2).items()
    assert PatchDiffusion.guidance == 1.3


# Loss

def test_the_network_sees_the_noisy_crop_and_clean_unscaled_coordinates_and_is_asked_for_the_image_channels_alone():
    asked, seen = [], []
    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return spy(seen)(c_in, c_out)
    PatchDiffusion(make_net, 3).loss(torch.zeros(64, 3, 16, 16), s=8)
    x, y = seen[0]
    assert asked == [(5, 3)] and x.shape == (64, 5, 8, 8) and y is None
    grid = coordinates(16, 16)
    places = grid[:, :9, :9].flatten(1).T.double()                                        # (81, 2)
    for i in range(64):
        assert torch.cdist(x[i, 3:, 0, 0].double()[None], places).min() < 1e-6
        close(x[i, 3:, -1, -1] - x[i, 3:, 0, 0], [14 / 15, 14 / 15], rtol=1e-5)
    assert len({tuple(x[i, 3:, 0, 0].tolist()) for i in range(64)}) > 20


def test_a_crop_of_an_image_that_is_not_square_keeps_its_shape():
    seen = []
    PatchDiffusion(spy(seen), 1).loss(torch.zeros(2, 1, 16, 24), s=4)
    assert seen[0][0].shape == (2, 3, 4, 6)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_all_sizes_weigh_alike(size):  # a zero network's loss is 1 at each
    loss = PatchDiffusion(spy([]), 1).loss(0.5 * torch.randn(2000, 1, 16, 16), s=size)
    assert abs(loss - 1) < 5 * math.sqrt(2 / (2000 * size ** 2)) + 0.03


def test_without_a_size_one_is_drawn_by_the_shares():
    for p, sizes in ((1.0, {8}), (0.0, {2, 4})):
        seen = []
        model = PatchDiffusion(spy(seen), 1, p_full=p)
        for _ in range(30):
            model.loss(torch.zeros(2, 1, 8, 8))
        assert {x.shape[-1] for x, _ in seen} == sizes


def test_with_p_1_it_is_edm_with_two_more_inputs():
    x, y, losses = torch.randn(8, 1, 4, 4), torch.arange(8), []
    f = lambda x: x[:, :1].cos()
    for model in (PatchDiffusion(spy([], f), 1, p_full=1.0, P_mean=-0.5, sigma_data=0.3), EDM(spy([], f), 1, P_mean=-0.5, sigma_data=0.3)):
        draws = iter(torch.randn(10, 8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        model.draw_sigma = lambda B, device: tensor(range(1, B + 1)).view(-1, 1, 1, 1) / 4
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: next(draws))
            losses.append(model.loss(x, y))
    close(*losses)


def test_labels_go_with_the_crop():
    seen = []
    PatchDiffusion(spy(seen), 1).loss(torch.zeros(3, 1, 8, 8), tensor([2, -1, 0], torch.long), s=4)
    assert seen[0][1].tolist() == [2, -1, 0]


# Sampling

def test_the_whole_canvas_is_sampled_on_the_grid_of_training():
    seen = []
    model = PatchDiffusion(spy(seen), 1)
    last(model.sample(torch.randn(2, 1, 8, 12), steps=3))
    model.loss(torch.zeros(2, 1, 8, 12), s=8)
    last(ode_sample(denoiser(model), torch.randn(2, 1, 8, 12), steps=2))
    assert len(seen) == 9
    for x, _ in seen:
        close(x[0, 1:], coordinates(8, 12), rtol=1e-6, atol=1e-6)


def test_a_window_is_sampled_at_its_own_place_with_guidance_too():
    seen, where = [], coordinates(8, 8)[:, 2:6, 4:8]
    model = PatchDiffusion(spy(seen), 1)
    model.net = Guided(model.net, 1.3)
    last(model.sample(torch.randn(2, 1, 4, 4), tensor([0, 1], torch.long), steps=2, corner=(2, 4), image=(8, 8)))
    assert len(seen) == 6 and [y is None for _, y in seen[:2]] == [False, True]
    for x, _ in seen:
        close(x[1, 1:], where)


@pytest.mark.parametrize("corner, image, expected", [
    ((0, 0), (8, 8), coordinates(12, 20, (8, 8))),                # goes on past the image
    ((0, 0), (), coordinates(12, 20)),                            # the image at another size
    ((-2, 3), (8, 30), coordinates(10, 23, (8, 30))[:, :10, 3:])])
def test_a_canvas_lies_where_corner_and_image_say(corner, image, expected):
    seen = []
    last(PatchDiffusion(spy(seen), 1).sample(torch.randn(1, 1, 12, 20), steps=2, corner=corner, image=image))
    got = seen[0][0][0, 1:]
    close(got[:, 2:] if corner == (-2, 3) else got, expected, atol=1e-6)
    if corner == (-2, 3):
        close(got[1, 0], torch.full((20,), 2 * -2 / 7 - 1), rtol=1e-6)


@pytest.mark.parametrize("options", [dict(corner=(1,)), dict(image=(8,)), dict(image=(0, 8)), dict(corner=(1, 2, 3))])
def test_a_corner_or_an_image_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="corner"):
        last(PatchDiffusion(spy([]), 1).sample(torch.randn(1, 1, 8, 8), steps=2, **options))
