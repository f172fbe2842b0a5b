import inspect
import math

import pytest
import torch
from explain import close, equal, holds, within
from helpers import images, last, tensor, watched

from edm import EDM, denoiser, ode_sample
from patch_diffusion import (
    PatchDiffusion,
    coordinates,
    patch_sizes,
    progressive_size,
    random_crop,
)
from unet import Guided


def blank(x, c_noise, y):
    """F = 0 of the image's channels; the last two are coordinates."""
    return torch.zeros_like(x[:, :-2])


# Coordinates

@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "coordinates")
@pytest.mark.parametrize("H, W", [(32, 32), (28, 28), (7, 12), (96, 64)])
def test_the_corners_are_exactly_minus_1_and_1_and_x_comes_first(H, W):
    u = coordinates(H, W)
    equal(u.shape, (2, H, W))
    equal(u[:, 0, 0].tolist(), [-1, -1], what="(x, y) at the top left")
    equal(u[:, 0, -1].tolist(), [1, -1], what="(x, y) at the top right")
    equal(u[:, -1, 0].tolist(), [-1, 1], what="(x, y) at the bottom left")
    equal(u[:, -1, -1].tolist(), [1, 1], what="(x, y) at the bottom right")
    columns = [2 * k / (W - 1) - 1 for k in range(W)]
    rows = [2 * k / (H - 1) - 1 for k in range(H)]
    close(u[0, 3], columns, atol=1e-6, what="x along a row")
    close(u[1, :, 3], rows, atol=1e-6, what="y along a column")


@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "coordinates")
def test_past_the_image_coordinates_go_on_and_within_it_they_are_the_same():
    u = coordinates(12, 20, (6, 10))
    close(u[:, :6, :10], coordinates(6, 10), atol=1e-6, what="within the image")
    outside = [2 * 19 / 9 - 1, 2 * 11 / 5 - 1]
    close(u[:, 11, 19], outside, rtol=1e-6, what="(x, y) of row 11, column 19")


@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "coordinates")
def test_one_pixel_lies_somewhere_and_four_at_the_corners():
    one = coordinates(1, 1)
    holds(one.isfinite().all(), "the coordinates of one pixel are numbers", came=one)
    equal(coordinates(2, 2).tolist(), [[[-1, 1], [-1, 1]], [[-1, -1], [1, 1]]])


# Crops

@pytest.mark.equation("patch_diffusion", "Sec. 3.1")
@pytest.mark.function("patch_diffusion", "random_crop")
@pytest.mark.parametrize("H, W, s", [(16, 16, 4), (8, 12, (4, 6)), (12, 8, 8), (8, 8, 8)])
def test_a_crop_is_a_window_of_the_image_and_of_the_grid(H, W, s):
    x = torch.arange(H * W).float().view(1, 1, H, W)  # each pixel its own number
    crop, coords = random_crop(x.repeat(64, 2, 1, 1), s)
    h, w = s if isinstance(s, tuple) else (s, s)
    equal(crop.shape, (64, 2, h, w), what="shape of the crops")
    equal(coords.shape, (64, 2, h, w), what="shape of their coordinates")
    for k in range(64):
        top, left = divmod(int(crop[k, 0, 0, 0]), W)
        window = x[0, :, top:top + h, left:left + w].expand(2, -1, -1)
        equal(crop[k], window, what=f"the window at {top}, {left}, not resized")
        grid = coordinates(H, W)[:, top:top + h, left:left + w]
        close(coords[k], grid, atol=1e-6, what=f"coordinates of the window at {top}, {left}")


@pytest.mark.equation("patch_diffusion", "Sec. 3.1")
@pytest.mark.function("patch_diffusion", "random_crop")
def test_each_image_has_its_own_place_and_every_place_is_equally_likely():
    B = 20_000
    x = torch.arange(6 * 8).float().view(1, 1, 6, 8).expand(B, 1, 6, 8)
    crop, _ = random_crop(x, (4, 4))
    corner = crop[:, 0, 0, 0].long()
    places = corner // 8 * 5 + corner % 8
    equal(sorted(places.unique().tolist()), list(range(3 * 5)), what="the places drawn")
    within(places.bincount(), B / 15, (B / 15) ** 0.5, what="how often each was drawn")


@pytest.mark.equation("patch_diffusion", "Sec. 3.1")
@pytest.mark.function("patch_diffusion", "random_crop")
def test_a_crop_may_be_a_single_pixel():
    x = torch.randn(3, 2, 4, 4)
    crop, coords = random_crop(x, (1, 1))
    equal(crop.shape, (3, 2, 1, 1), what="shape of the crops")
    equal(coords.shape, (3, 2, 1, 1), what="shape of their coordinates")
    for k in range(3):
        same = (x[k] == crop[k]).all(0)
        holds(same.any(), "the crop is a pixel of its image", crop=crop[k])


@pytest.mark.function("patch_diffusion", "random_crop")
@pytest.mark.parametrize("s", [9, (4, 9), (9, 4), 0, (0, 4), (4, 0)])
def test_a_crop_larger_than_the_image_is_refused(s):
    with pytest.raises(ValueError):
        random_crop(torch.zeros(1, 1, 8, 8), s)


# Sizes

@pytest.mark.equation("patch_diffusion", "Eq. 5")
@pytest.mark.function("patch_diffusion", "patch_sizes")
@pytest.mark.parametrize("p", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("R", [28, 32, 48, 64, 96, 128])
def test_the_shares_are_p_three_fifths_and_two_fifths_of_the_rest(R, p):
    shares = patch_sizes(R, p)
    equal(list(shares), [R, R // 2, R // 4], what="the sizes")
    expected = [p, 0.6 * (1 - p), 0.4 * (1 - p)]
    close(list(shares.values()), expected, atol=1e-12, what="their shares")


@pytest.mark.function("patch_diffusion", "patch_sizes")
def test_without_quarter_crops_halves_take_all_of_the_rest():
    shares = patch_sizes(32, 0.3, quarter=False)
    equal(list(shares), [32, 16], what="the sizes")
    close(list(shares.values()), [0.3, 0.7], atol=1e-12, what="their shares")


@pytest.mark.function("patch_diffusion", "patch_sizes")
def test_a_size_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        patch_sizes(30, 0.5)
    with pytest.raises(ValueError, match="divisible by 2"):
        patch_sizes(31, 0.5, quarter=False)
    equal(patch_sizes(30, 0.5, quarter=False)[15], 0.5, what="the share of halves of 30")
    equal(patch_sizes(30, 1.0)[30], 1, what="the share of whole images at p = 1")


@pytest.mark.equation("patch_diffusion", "Eq. 5")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.draw_size")
def test_stochastic_sizes_come_with_their_shares():
    net, _ = watched(blank)
    model = PatchDiffusion(net, 1, p_full=0.3)
    drawn = [model.draw_size(32, 0.0) for _ in range(4000)]
    for size, p in {32: 0.3, 16: 0.42, 8: 0.28}.items():
        standard_error = (p * (1 - p) / 4000) ** 0.5
        within(drawn.count(size) / 4000, p, standard_error, what=f"the share of size {size}")


@pytest.mark.equation("patch_diffusion", "Sec. 3.2")
@pytest.mark.function("patch_diffusion", "progressive_size")
def test_progressive_sizes_grow_and_keep_their_shares():
    drawn = [progressive_size(64, 0.5, (k + 0.5) / 1000) for k in range(1000)]
    shares = {size: drawn.count(size) for size in (16, 32, 64)}
    equal(shares, {16: 200, 32: 300, 64: 500}, what="how many of 1000 steps have each size")
    equal(drawn, sorted(drawn), what="the sizes in the order of the steps")


@pytest.mark.equation("patch_diffusion", "Sec. 3.2")
@pytest.mark.function("patch_diffusion", "progressive_size")
@pytest.mark.parametrize("p, progress, quarter, expected", [
    (0.0, 0.4, True, 32),
    (0.5, 1.0, True, 64),
    (0.5, 0.0, False, 32),
])
def test_a_progressive_size_belongs_to_the_share_that_progress_falls_in(
    p, progress, quarter, expected
):
    equal(progressive_size(64, p, progress, quarter=quarter), expected)


@pytest.mark.function("patch_diffusion", "PatchDiffusion.draw_size")
def test_a_progressive_run_takes_its_sizes_from_its_progress():
    net, _ = watched(blank)
    model = PatchDiffusion(net, 1, sizes="progressive")
    equal([model.draw_size(64, progress) for progress in (0.1, 0.3, 0.7)], [16, 32, 64])


@pytest.mark.function("patch_diffusion", "PatchDiffusion.__init__")
def test_the_defaults_are_the_paper_s():
    parameters = inspect.signature(PatchDiffusion).parameters
    expected = {
        "p_full": 0.5, "sizes": "stochastic", "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2
    }
    equal({name: parameters[name].default for name in expected}, expected)
    equal(PatchDiffusion.guidance, 1.3)


@pytest.mark.function("patch_diffusion", "PatchDiffusion.sample")
def test_the_sampler_s_defaults_are_edm_s():
    of_edm = inspect.signature(EDM.sample).parameters
    parameters = inspect.signature(PatchDiffusion.sample).parameters
    shared = [name for name in parameters if name in of_edm]
    expected = {name: of_edm[name].default for name in shared}
    equal({name: parameters[name].default for name in shared}, expected)


@pytest.mark.function("patch_diffusion", "PatchDiffusion.__init__")
@pytest.mark.parametrize("options, expected", [
    ({}, 4), ({"quarter": False}, 2), ({"p_full": 1.0}, 1),
])
def test_image_sizes_must_divide_by_what_crops_divide_them_by(options, expected):
    net, _ = watched(blank)
    equal(PatchDiffusion(net, 1, **options).size_multiple, expected)


@pytest.mark.function("patch_diffusion", "PatchDiffusion.__init__")
def test_latents_do_without_quarter_crops():
    equal(PatchDiffusion.latent_config, {"quarter": False})


# Loss

@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.__init__")
def test_the_network_takes_two_more_channels_and_gives_the_image_s_alone():
    asked = []

    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return torch.nn.Identity()

    PatchDiffusion(make_net, 3)
    equal(asked, [(5, 3)], what="the network's channels in and out")


@pytest.mark.equation("patch_diffusion", "Sec. 3.1", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss")
def test_the_network_sees_the_noisy_crop_and_its_coordinates_clean_and_unscaled():
    net, calls = watched(blank)
    PatchDiffusion(net, 3).loss(torch.zeros(64, 3, 16, 16), s=8)
    x = calls[0].x
    equal(x.shape, (64, 5, 8, 8), what="shape of the network's input")
    equal(calls[0].y, None, what="the labels")
    places = coordinates(16, 16)[:, :9, :9].flatten(1).T.double()  # (81, 2)
    first = x[:, 3:, 0, 0].double()
    off = torch.cdist(first, places).min(1).values.max()
    holds(off < 1e-6, "each crop's first pixel lies on the image's grid", farthest_off=off)
    across = x[:, 3:, -1, -1] - x[:, 3:, 0, 0]
    close(across, torch.full((64, 2), 14 / 15), rtol=1e-5, what="from corner to corner")
    different = len(first.unique(dim=0))
    holds(different > 20, "the 64 crops lie at more than 20 places", places=different)


@pytest.mark.equation("patch_diffusion", "Sec. 3.1")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss")
def test_a_crop_of_an_image_that_is_not_square_keeps_its_shape():
    net, calls = watched(blank)
    PatchDiffusion(net, 1).loss(torch.zeros(2, 1, 16, 24), s=4)
    equal(calls[0].x.shape, (2, 3, 4, 6))


@pytest.mark.equation("patch_diffusion", "Sec. 3.1")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss")
@pytest.mark.parametrize("size", [16, 8, 4])
def test_all_sizes_weigh_alike(size):
    net, _ = watched(blank)  # a zero network's loss is 1 at each
    loss = PatchDiffusion(net, 1).loss(0.5 * torch.randn(2000, 1, 16, 16), s=size)
    within(loss, 1, math.sqrt(2 / (2000 * size**2)), slack=0.03)


@pytest.mark.equation("patch_diffusion", "Eq. 5")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss", "PatchDiffusion.draw_size")
@pytest.mark.parametrize("p, expected", [(1.0, [8]), (0.0, [2, 4])])
def test_without_a_size_one_is_drawn_by_the_shares(p, expected):
    net, calls = watched(blank)
    model = PatchDiffusion(net, 1, p_full=p)
    for _ in range(30):
        model.loss(torch.zeros(2, 1, 8, 8))
    equal(sorted({call.x.shape[-1] for call in calls}), expected, what="the sizes drawn")


@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss")
def test_with_p_1_it_is_edm_with_two_more_inputs(monkeypatch):
    net, _ = watched(lambda x, c_noise, y: x[:, :1].cos())
    options = {"P_mean": -0.5, "sigma_data": 0.3}
    x = torch.randn(8, 1, 4, 4)
    n = torch.randn(8, 1, 4, 4)
    sigma = images(*range(1, 9)) / 4
    monkeypatch.setattr(EDM, "draw_sigma", lambda self, B, device: sigma)
    monkeypatch.setattr(torch, "randn_like", lambda x: n)
    on_crops = PatchDiffusion(net, 1, p_full=1.0, **options).loss(x, torch.arange(8))
    close(on_crops, EDM(net, 1, **options).loss(x, torch.arange(8)), what="EDM's loss")


@pytest.mark.function("patch_diffusion", "PatchDiffusion.loss")
def test_labels_go_with_the_crop():
    net, calls = watched(blank)
    PatchDiffusion(net, 1).loss(torch.zeros(3, 1, 8, 8), tensor([2, -1, 0], torch.long), s=4)
    equal(calls[0].y.tolist(), [2, -1, 0])


# Sampling

@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.sampling_planes")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.sample")
def test_the_whole_canvas_is_sampled_on_the_grid_of_training():
    net, calls = watched(blank)
    model = PatchDiffusion(net, 1)
    last(model.sample(torch.randn(2, 1, 8, 12), steps=3))
    model.loss(torch.zeros(2, 1, 8, 12), s=8)
    last(ode_sample(denoiser(model), torch.randn(2, 1, 8, 12), steps=2))
    equal(len(calls), 5 + 1 + 3, what="evaluations")
    for call in calls:
        close(call.x[0, 1:], coordinates(8, 12), rtol=1e-6, atol=1e-6)


@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.sample")
def test_a_window_is_sampled_at_its_own_place_with_guidance_too():
    net, calls = watched(blank)
    model = PatchDiffusion(net, 1)
    model.net = Guided(model.net, 1.3)
    y = tensor([0, 1], torch.long)
    noise = torch.randn(2, 1, 4, 4)
    last(model.sample(noise, y, steps=2, corner=(2, 4), image=(8, 8)))
    without_class = [call.y is None for call in calls]
    equal(without_class, [False, True] * 3, what="which evaluations see no class")
    for call in calls:
        close(call.x[1, 1:], coordinates(8, 8)[:, 2:6, 4:8], what="the window's coordinates")


@pytest.mark.equation("patch_diffusion", "Sec. 3.3")
@pytest.mark.function("patch_diffusion", "PatchDiffusion.sample", "coordinates")
@pytest.mark.parametrize("corner, image", [
    ((0, 0), (8, 8)),  # goes on past the image
    ((0, 0), ()),  # the image at another size
    ((-2, 3), (8, 30)),
    ((0, 0), (2, 1)),
])
def test_a_canvas_lies_where_corner_and_image_say(corner, image):
    net, calls = watched(blank)
    noise = torch.randn(1, 1, 12, 20)
    last(PatchDiffusion(net, 1).sample(noise, steps=2, corner=corner, image=image))
    height, width = image or (12, 20)
    x = 2 * (corner[1] + torch.arange(20)) / max(1, width - 1) - 1
    y = 2 * (corner[0] + torch.arange(12)) / (height - 1) - 1
    got = calls[0].x[0]
    close(got[1], x.expand(12, 20), atol=1e-6, what="x of each pixel")
    close(got[2], y[:, None].expand(12, 20), atol=1e-6, what="y of each pixel")


@pytest.mark.function("patch_diffusion", "PatchDiffusion.sample")
@pytest.mark.parametrize("options", [
    {"corner": (1,)}, {"image": (8,)}, {"image": (0, 8)}, {"corner": (1, 2, 3)},
])
def test_a_corner_or_an_image_that_cannot_be_is_refused(options):
    net, _ = watched(blank)
    with pytest.raises(ValueError, match="corner"):
        last(PatchDiffusion(net, 1).sample(torch.randn(1, 1, 8, 8), steps=2, **options))
