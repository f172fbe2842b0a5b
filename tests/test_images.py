import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image, features

from plumbing import images as pixels
from plumbing.flags import UserError
from plumbing.images import (
    fit,
    open_image,
    save_gif,
    save_grid,
    save_strip,
    to_float,
    to_image,
    to_rgb,
    to_uint8,
)


def picture(mode="RGB", width=12, height=8):
    """A Pillow image of random pixels."""
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def written(image, path, **options):
    image.save(path, **options)
    return path


def claiming(width, height, path):
    """A PNG file whose header tells this size; its pixels are few, and quickly written."""
    data = bytearray(written(picture(), path).read_bytes())
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


def read_rgb(path):
    """(H, W, 3) of a file."""
    return np.asarray(to_rgb(open_image(path)))


def refusal(path, **options):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as error:
        open_image(path, **options)
    text = str(error.value)
    assert "\n" not in text, f"an error has one line; this one has more: {text}"
    return text


# uint8 and [-1, 1]


def test_every_pixel_value_survives_the_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x).min() == -1
    assert to_float(x).max() == 1
    assert torch.equal(to_uint8(to_float(x)), x)


def test_to_uint8_rounds_to_nearest_and_clips():
    x = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


def test_floats_pass_through_to_float_as_they_are():
    latents = torch.tensor([-7.0, 0.0, 300.0])
    assert torch.equal(to_float(latents), latents)


@pytest.mark.parametrize("channels, mode, shown", [(1, "L", 1), (3, "RGB", 3), (4, "RGB", 3)])
def test_a_picture_shows_one_channel_as_gray_and_of_many_the_first_three(channels, mode, shown):
    x = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3)
    image = to_image(x)
    values = np.asarray(image).reshape(2, 3, -1)
    assert image.mode == mode
    assert np.array_equal(values, x[:shown].permute(1, 2, 0))


# Pictures of many images


def test_a_grid_holds_every_image_in_reading_order(tmp_path):
    values = [0, 20, 40, 60, 80, 100]
    x = torch.tensor(values, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    save_grid(x, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    height, width = grid.shape[0] // 2, grid.shape[1] // 3
    found = []
    for row in range(2):
        for column in range(3):
            found.append(grid[height // 2 + height * row, width // 2 + width * column, 0])
    assert found == values


def test_a_grid_has_a_margin_for_labels_and_leaves_the_images_as_they_are():
    x = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    plain = np.asarray(pixels.grid(x, columns=1))
    labelled = np.asarray(pixels.grid(x, columns=1, labels=["one", "two"]))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 0, "no room was left for the labels"
    assert np.array_equal(labelled[:, margin:], plain), "the labels moved or cover an image"
    assert labelled[:, :margin].max() > 200, "no label is written"


def chain(length, images=1):
    """Images of one gray: x goes from 1 to 0, x_0_hat from 0 to -1; of the second by half."""
    scale = torch.tensor([1.0, 0.5])[:images].view(-1, 1, 1, 1)
    frames = []
    for k in range(length):
        x = torch.full((images, 3, 8, 8), 1 - k / (length - 1))
        frames.append((scale * x, scale * (x - 1)))
    return frames


def test_a_strip_shows_eight_moments_x_above_and_x_0_hat_below(tmp_path):
    save_strip(chain(15, images=2), tmp_path / "strip.png")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))[..., 0].astype(float)
    zoom, gap = 8, 2  # 512 pixels are 8 columns of 8, magnified 8 times
    side = 8 * zoom + gap
    assert strip.shape[0] == 4 * side + gap, "two images make four rows"
    margin = strip.shape[1] - gap - 8 * side
    for row in range(4):
        middle = gap + row * side + side // 2
        found = strip[middle, margin + side // 2::side]
        value = 1 - np.arange(8) / 7
        if row % 2:
            value = value - 1
        if row >= 2:
            value = value / 2
        expected = 127.5 + 127.5 * value
        assert np.abs(found - expected).max() <= 1, f"row {row}: {found}, not {expected}"


def test_an_animation_shows_every_frame_and_rests_on_the_last(tmp_path):
    save_gif(chain(5, images=2), tmp_path / "chain.gif")
    with Image.open(tmp_path / "chain.gif") as animation:
        durations, values = [], []
        for k in range(animation.n_frames):
            animation.seek(k)
            durations.append(animation.info["duration"])
            frame = np.asarray(animation.convert("RGB")).astype(float)
            height, width, _ = frame.shape
            values.append(frame[[height // 4, height * 3 // 4], width // 4, 0])
    assert sum(durations) == (5 + 20) * 50, "50 ms a frame, and the last for a second more"
    assert np.abs(values[0] - [255, 127.5]).max() < 8, "the first frame is not x over x_0_hat"
    assert np.abs(values[-1] - [127.5, 0]).max() < 8, "the last frame is not the end"


def test_noise_is_scaled_to_half_a_unit_and_finished_images_are_not():
    noise = 80 * torch.randn(2, 3, 16, 16)
    image = torch.linspace(-0.8, 0.8, 64).view(1, 1, 8, 8)
    std = pixels.visible(noise).std(dim=(1, 2, 3))
    torch.testing.assert_close(std, torch.full((2,), 0.5))
    assert torch.equal(pixels.visible(image), image)


@pytest.mark.parametrize("name", ["no folder/grid.png", "grid.unknown"])
def test_a_picture_that_cannot_be_written_is_a_users_mistake(tmp_path, name):
    with pytest.raises(UserError, match="cannot write"):
        save_grid(torch.zeros(1, 3, 8, 8), tmp_path / name)


# Image files


@pytest.mark.parametrize("format", pixels.FORMATS)
def test_every_promised_format_is_read_from_a_path_and_from_bytes(tmp_path, format):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow was built without WEBP")
    path = written(picture(), tmp_path / "image", format=format)
    from_path = open_image(path)
    from_bytes = open_image(io.BytesIO(path.read_bytes()))
    assert from_path.size == (12, 8)
    assert np.array_equal(np.asarray(from_path), np.asarray(from_bytes))


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO"])
def test_a_file_of_another_format_is_refused_whatever_its_name(tmp_path, format):
    path = written(picture(), tmp_path / "z.png", format=format)
    assert "z.png: it is no image (PNG" in refusal(path)


def test_a_cut_off_image_is_refused_by_name(tmp_path):
    path = written(picture(width=64, height=64), tmp_path / "short.png")
    path.write_bytes(path.read_bytes()[:500])
    assert "short.png" in refusal(path)
    file = io.BytesIO(path.read_bytes())
    assert "the file of page 3" in refusal(file, name="the file of page 3")


@pytest.mark.filterwarnings("ignore")  # pytest puts its own filters before the module's
@pytest.mark.parametrize("at", range(8, 160, 4))
def test_a_damaged_image_is_refused_or_read_and_never_raises_anything_else(tmp_path, at):
    content = bytearray(written(picture(), tmp_path / "image.tif").read_bytes())
    content[at % len(content)] ^= 0xFF
    try:
        to_rgb(open_image(io.BytesIO(content)))
    except UserError as error:
        assert "\n" not in str(error)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    giant = claiming(20_000, 9_000, tmp_path / "giant.png")
    assert "giant.png" in refusal(giant)
    monkeypatch.setattr(pixels, "LARGEST_IMAGE", 95)
    large = written(picture(), tmp_path / "large.png")
    large.write_bytes(large.read_bytes()[:60])  # what follows the header
    assert "12x8; no image may have over" in refusal(large)


def test_a_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert "folder.png" in refusal(tmp_path / "folder.png")
    assert "nothing.png: No such file" in refusal(tmp_path / "nothing.png")


def test_colours_that_pillow_does_not_convert_are_refused(tmp_path):
    path = written(Image.new("LAB", (4, 4)), tmp_path / "lab.tif")
    assert "LAB" in refusal(path)


def test_an_error_stays_on_one_line_and_can_be_printed_whatever_the_name():
    text = refusal(io.BytesIO(b"no image"), name="a\nb\udc80.png")
    assert r"a\nb\udc80.png" in text
    text.encode()


def test_the_reason_of_an_error_is_its_first_line_or_at_least_its_kind():
    assert pixels.because(ValueError("too large\nTo allow it, ...")) == "too large"
    assert pixels.because(MemoryError()) == "MemoryError"
    assert pixels.because(FileNotFoundError(2, "No such file", "name")) == "No such file"


def test_pillow_prints_nothing_beside_the_one_error(tmp_path):
    """In a process of its own, with its own filters; torch, slow to load, has no part in it."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0\x12\x01\x03\0\x01"  # cut off
    written(picture(), tmp_path / "exif.jpg", exif=exif)
    claiming(10_000, 9_000, tmp_path / "large.png")
    palette = picture().quantize(8)
    written(palette, tmp_path / "palette.png", transparency=bytes([0, 128]))
    code = """if True:
        import sys, types
        sys.modules["torch"] = types.ModuleType("torch")
        from plumbing.images import UserError, open_image, to_rgb
        to_rgb(open_image("exif.jpg"))
        to_rgb(open_image("palette.png"))
        try:
            open_image("large.png")
        except UserError as error:
            print(error)
    """
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", f"printed beside the error: {done.stderr}"
    (line,) = done.stdout.splitlines()
    assert "10000x9000; no image may have over" in line


# What an image becomes


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    x = read_rgb(written(image, tmp_path / "a.png"))
    assert x[0, 0].tolist() == [255, 255, 255], "fully transparent is white"
    assert x[0, 1].tolist() == [0, 0, 255], "opaque keeps its colour"
    assert abs(int(x[0, 2, 0]) - 127) <= 1, "half transparent black is gray"


def test_a_palette_image_shows_its_colours_and_its_transparency(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((1, 0), 1)
    x = read_rgb(written(image, tmp_path / "a.png", transparency=0))
    assert x[0, 0].tolist() == [255, 255, 255]
    assert x[0, 1].tolist() == [200, 100, 50]


def test_sixteen_bit_gray_keeps_its_upper_eight_bits(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    x = read_rgb(written(Image.fromarray(values), tmp_path / "a.png"))
    assert x[0, :, 0].tolist() == [0, 100, 255]


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    path = written(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg")
    red, green, blue = read_rgb(path).mean((0, 1))
    assert red > 200
    assert max(green, blue) < 60


def test_exif_rotation_is_applied(tmp_path):
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    x = read_rgb(written(image, tmp_path / "a.png", exif=exif))
    assert np.array_equal(x, np.rot90(np.asarray(image), -1))


def test_images_are_cut_about_their_centre_then_resized_without_aliasing():
    wide = np.zeros((64, 192, 3), np.uint8)
    checkerboard = np.indices((64, 64)).sum(0)[..., None] % 2 * 255
    wide[:, 64:128] = checkerboard  # between black wings
    x = np.asarray(fit(Image.fromarray(wide), (16, 16))).astype(float)
    inside = x[:, 2:-2]
    assert x.shape == (16, 16, 3)
    assert np.abs(inside - 127.5).max() < 4, "a fine checkerboard must become even gray"
    assert fit(picture(), (8, 24)).size == (24, 8)


def test_an_image_of_the_right_size_and_no_size_leave_it_as_it_is():
    image = picture()
    assert fit(image, (8, 12)) is image
    assert fit(image, None) is image
