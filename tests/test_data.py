import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import digits, load, save_grid, to_float, to_uint8


def picture(seed=0, size=(12, 8), mode="RGB"):  # (width, height)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


# uint8 and [-1, 1]

def test_every_pixel_value_survives_the_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x).min() == -1 and to_float(x).max() == 1
    assert torch.equal(to_uint8(to_float(x)), x)


def test_to_uint8_rounds_to_nearest_and_clips():
    x = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


# Image files

def test_a_folder_gives_images_and_a_class_for_each_sub_folder(tmp_path):
    for k, name in enumerate(("b/one.PNG", "a/two.Png", "a/deep.bmp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(k).save(tmp_path / name, format="bmp" if name.endswith("bmp") else "png")
    (tmp_path / "notes.txt").write_text("no image")
    images, labels, names = load(tmp_path)
    assert images.shape == (3, 3, 8, 12) and images.dtype == torch.uint8 and names == ["a", "b"]
    assert labels.tolist() == [0, 0, 1]
    assert np.array_equal(images[2].permute(1, 2, 0), np.asarray(picture(0)))


def test_a_zip_reads_like_the_folder_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for k in range(3):
            buffer = io.BytesIO()
            picture(k).save(buffer, "png")
            archive.writestr(f"top/{'xy'[k % 2]}/{k}.png", buffer.getvalue())
    images, labels, names = load(tmp_path / "set.zip")
    assert images.shape == (3, 3, 8, 12) and labels.tolist() == [0, 0, 1] and names == ["x", "y"]


def test_images_in_one_folder_have_no_classes(tmp_path):
    picture().save(tmp_path / "a.png")
    assert load(tmp_path)[1:] == (None, [])


def one(tmp_path, image, name="a.png", **kw):
    image.save(tmp_path / name, **kw.pop("save", {}))
    return load(tmp_path, **kw)[0][0]


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    x = one(tmp_path, image)
    assert x[:, 0, 0].tolist() == [255, 255, 255] and x[:, 0, 1].tolist() == [0, 0, 255] and abs(x[0, 0, 2] - 127) <= 1


def test_a_palette_image_shows_its_colours_and_its_transparency(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((1, 0), 1)
    x = one(tmp_path, image, save=dict(transparency=0))
    assert x[:, 0, 0].tolist() == [255, 255, 255] and x[:, 0, 1].tolist() == [200, 100, 50]


def test_sixteen_bit_gray_keeps_its_upper_eight_bits(tmp_path):
    x = one(tmp_path, Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))
    assert x.tolist() == [[[0, 100, 255]]]


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    x = one(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg")
    assert x.shape == (3, 8, 8) and x[0].float().mean() > 200 and x[1:].float().mean() < 60


def test_exif_rotation_is_applied(tmp_path):
    image, exif = picture(size=(12, 8)), Image.Exif()
    exif[0x0112] = 6                                                     # turn by 90 degrees to see it upright
    x = one(tmp_path, image, save=dict(exif=exif))
    assert np.array_equal(x.permute(1, 2, 0), np.rot90(np.asarray(image), -1))


def test_gray_stays_one_channel_unless_colour_is_asked_for(tmp_path):
    gray = picture(mode="L")
    x = one(tmp_path, gray)
    assert x.shape == (1, 8, 12) and np.array_equal(x[0], np.asarray(gray))
    assert torch.equal(load(tmp_path, channels=3)[0][0], x.repeat(3, 1, 1))
    picture(1).save(tmp_path / "b.png")
    assert load(tmp_path)[0].shape == (2, 3, 8, 12)                      # one colour image makes the set colour
    assert load(tmp_path, channels=1)[0].shape == (2, 1, 8, 12)


def test_images_are_cropped_about_their_centre_then_resized_without_aliasing(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = np.indices((64, 64)).sum(0)[..., None] % 2 * 255   # a fine checkerboard between black wings
    x = one(tmp_path, Image.fromarray(wide), size=16).float()
    assert x.shape == (3, 16, 16) and (x[:, 2:-2, 2:-2] - 127.5).abs().max() < 4
    assert load(tmp_path, size=(8, 24))[0].shape == (1, 3, 8, 24)


# Arrays

@pytest.mark.parametrize("shape, order", [((5, 3, 8, 6), "nchw"), ((5, 8, 6, 3), "nhwc"), ((5, 8, 6), "gray")])
def test_uint8_arrays_may_have_their_channels_first_last_or_none(tmp_path, shape, order):
    a = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(tmp_path / "a.npz", images=a, labels=np.arange(5) % 2)
    images, labels, names = load(tmp_path / "a.npz")
    expected = {"nchw": a, "nhwc": a.transpose(0, 3, 1, 2) if a.ndim == 4 else a, "gray": a[:, None]}[order]
    assert np.array_equal(images, expected) and labels.tolist() == [0, 1, 0, 1, 0] and names == ["0", "1"]


def test_of_several_arrays_the_training_images_are_taken_or_none(tmp_path):
    a, b = np.zeros((5, 8, 8, 3), np.uint8), np.ones((7, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "keras.npz", x_test=a, y_test=np.arange(5)[:, None], x_train=b, y_train=np.arange(7)[:, None] % 3)
    images, labels, _ = load(tmp_path / "keras.npz")
    assert len(images) == 7 and images.min() == 1 and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.savez(tmp_path / "two.npz", a=a, b=b)
    with pytest.raises(ValueError, match="several arrays of images, a, b"):
        load(tmp_path / "two.npz")


def test_float_arrays_are_latents_and_come_back_as_they_are(tmp_path):
    a = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float16)
    np.save(tmp_path / "a.npy", a)
    images, labels, _ = load(tmp_path / "a.npy")
    assert images.dtype == torch.float32 and np.array_equal(images, a.astype(np.float32)) and labels is None
    assert torch.equal(to_float(images), images)


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["idx", "idx.gz"])
def test_mnist_files_are_read_with_their_labels_and_padded_to_32(tmp_path, pack):
    a = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    end = ".gz" if pack is gzip.compress else ""
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(bytes([0, 0, 8, 3]) + np.array(a.shape, ">u4").tobytes() + a.tobytes()))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(bytes([0, 0, 8, 1]) + np.array([4], ">u4").tobytes() + bytes([7, 0, 2, 1])))
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{end}"):
        images, labels, _ = load(source)
        assert images.shape == (4, 1, 32, 32) and np.array_equal(images[:, 0, 2:-2, 2:-2], a) and images.sum() == a.sum()
        assert labels.tolist() == [7, 0, 2, 1]
    assert np.array_equal(load(tmp_path, size=28)[0][:, 0], a)


def cifar():
    a = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    return a, b"".join(bytes([k]) + a[k].tobytes() for k in range(6))


def test_cifar_10_s_binary_archive_is_read(tmp_path):
    a, raw = cifar()
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, content in (("data_batch_1.bin", raw[:3073 * 4]), ("data_batch_2.bin", raw[3073 * 4:]), ("test_batch.bin", raw), ("batches.meta.txt", b"cat\ndog\n")):
            member = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    images, labels, names = load(tmp_path / "cifar-10-binary.tar.gz")
    assert np.array_equal(images, a) and labels.tolist() == list(range(6)) and names == ["cat", "dog"]


# What cannot be used is named

def bad(tmp_path, kind):
    path = tmp_path / "set.zip"
    if kind == "missing":
        return tmp_path / "nothing-here"
    if kind == "empty folder":
        (tmp_path / "readme.txt").write_text("")
        return tmp_path
    if kind == "cut-off PNG":
        picture(size=(64, 64)).save(tmp_path / "good.png")
        (tmp_path / "short.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
        return tmp_path
    if kind == "broken zip":
        path.write_bytes(b"PK\3\4 no zip at all")
    if kind == "zip that escapes":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../evil.png", b"x")
    if kind == "sizes that differ":
        picture(size=(8, 8)).save(tmp_path / "a.png")
        picture(size=(9, 8)).save(tmp_path / "b.png")
        return tmp_path
    if kind == "object array":
        np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object))
        return tmp_path / "a.npy"
    if kind == "pickles of CIFAR":
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
        return tmp_path / "cifar-10-python.tar.gz"
    if kind == "cut-off idx":
        (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9]))
        return tmp_path
    if kind == "array that is no image":
        np.save(tmp_path / "a.npy", np.zeros((4, 4)))
        return tmp_path / "a.npy"
    if kind == "giant image":
        Image.new("1", (20_000, 9_000)).save(tmp_path / "giant.png")
        return tmp_path
    if kind == "unknown file":
        (tmp_path / "a.docx").write_text("")
        return tmp_path / "a.docx"
    return path


@pytest.mark.parametrize("kind, word", [
    ("missing", "nothing-here"), ("empty folder", ".txt"), ("cut-off PNG", "short.png"), ("broken zip", "set.zip"),
    ("zip that escapes", "../evil.png"), ("sizes that differ", "--size"), ("object array", "a.npy"), ("pickles of CIFAR", "binary"),
    ("cut-off idx", "idx"), ("array that is no image", "a.npy"), ("unknown file", "a.docx"), ("giant image", "giant.png")])
def test_bad_data_is_refused_by_name(tmp_path, kind, word):
    with pytest.raises(ValueError) as error:
        load(bad(tmp_path, kind))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_what_would_not_fit_in_memory_is_refused():
    with pytest.raises(ValueError, match="GB"):
        load("digits", size=8192)


# The built-in set

def test_digits_are_the_same_for_the_same_seed_and_hold_every_class_equally():
    images, labels = digits(count=200)
    again, _ = digits(count=200)
    other, _ = digits(count=200, seed=1)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.bincount().tolist() == [20] * 10


def test_digits_are_light_on_dark_and_come_at_any_size():
    for size, channels in (((16, 16), 3), ((24, 48), 1), ((64, 64), 3)):
        images, _ = digits(size, channels, count=20)
        assert images.shape == (20, channels, *size)
        assert images.amax(dim=(1, 2, 3)).min() > 150 and images.amin(dim=(1, 2, 3)).max() < 140


def test_digits_of_one_class_look_alike_and_unlike_the_others():  # a nearest-mean classifier on edges reads them
    images, labels = digits(count=2000)
    x = images.float().amax(1)
    x = ((x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)).flatten(1)
    means = torch.stack([x[:1000][labels[:1000] == d].mean(0) for d in range(10)])
    assert ((x[1000:] @ means.T - means.square().sum(1) / 2).argmax(1) == labels[1000:]).float().mean() > 0.5


def test_a_grid_holds_every_image_in_reading_order(tmp_path):
    x = torch.stack([torch.full((3, 4, 4), k * 20, dtype=torch.uint8) for k in range(6)])
    save_grid(x, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    h, w = grid.shape[0] // 2, grid.shape[1] // 3
    assert [grid[h // 2 + h * (k // 3), w // 2 + w * (k % 3), 0] for k in range(6)] == [0, 20, 40, 60, 80, 100]


def test_what_unpacks_to_more_than_the_machine_can_hold_is_refused_by_name(tmp_path, monkeypatch):
    zeros = np.zeros((40, 3, 32, 32), np.uint8)
    np.savez_compressed(tmp_path / "bomb.npz", zeros)
    with gzip.open(tmp_path / "bomb-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array([40, 32, 32], ">u4").tobytes() + zeros[:, 0].tobytes())
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("data_batch_1.bin")
        entry.size = 3073 * 40
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", bytes(100_000))
    monkeypatch.setattr(data, "memory", lambda: 60_000)
    monkeypatch.setattr(data, "LARGEST", 50_000)
    for name in ("bomb.npz", "bomb-images-idx3-ubyte.gz", "bomb.tar.gz", "bomb.zip"):
        with pytest.raises(ValueError, match="unpacks to"):
            load(tmp_path / name)


def test_an_array_that_claims_to_be_endless_is_refused(tmp_path):
    with open(tmp_path / "endless.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(10 ** 9, 3, 1024, 1024)))
    with pytest.raises(ValueError, match="endless.npy"):
        load(tmp_path / "endless.npy")
