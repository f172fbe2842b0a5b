import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import datasets
from plumbing import images as pixels
from plumbing.datasets import evenly, hold_out, load, load_like
from plumbing.flags import UserError


def picture(seed=0, width=12, height=8):
    """A Pillow image of random pixels."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def png(seed=0, **size):
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def write_tar(path, contents):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_idx(path, array, pack=bytes):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(pack(header + array.astype(np.uint8).tobytes()))
    return path


def write_npy(path, shape, content=b"", dtype="|u1"):
    """An array file whose header says what it likes."""
    with open(path, "wb") as file:
        header = dict(descr=dtype, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(content)
    return path


def random_bytes(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def refusal(source, **options):
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as error:
        load(source, **options)
    text = str(error.value)
    assert len(text.splitlines()) == 1, f"an error has one line; this one has more: {text}"
    text.encode()  # a name's stray bytes are escaped, or it could not be printed
    return text


# Folders and zips


def test_a_folder_gives_images_and_a_class_for_each_sub_folder(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    picture(0).save(tmp_path / "b/one.PNG")
    picture(1).save(tmp_path / "a/two.Png")
    picture(2).save(tmp_path / "a/deep.bmp")
    picture(3).save(tmp_path / "a/._two.png")  # as macOS leaves them in archives
    (tmp_path / "notes.txt").write_text("no image")
    images, labels, names = load(tmp_path)
    assert images.shape == (3, 3, 8, 12)
    assert images.dtype == torch.uint8
    assert names == ["a", "b"]
    assert labels.tolist() == [0, 0, 1]
    assert np.array_equal(images[2].permute(1, 2, 0), np.asarray(picture(0)))


def test_a_zip_reads_like_the_folder_it_holds(tmp_path):
    contents = {"top/x/0.png": png(0), "top/y/1.png": png(1), "top/x/2.png": png(2)}
    folder = tmp_path / "folder"
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    images, labels, names = load(write_zip(tmp_path / "set.zip", contents))
    same, same_labels, same_names = load(folder)
    assert torch.equal(images, same)
    assert labels.tolist() == same_labels.tolist() == [0, 0, 1]
    assert names == same_names == ["x", "y"]


def test_images_in_one_folder_have_no_classes(tmp_path):
    picture().save(tmp_path / "a.png")
    _, labels, names = load(tmp_path)
    assert labels is None
    assert names == []


@pytest.mark.parametrize("name", ["./z.png", "a//z.png", "a/./z.png"])
def test_a_zip_may_spell_its_names_in_any_way(tmp_path, name):
    path = write_zip(tmp_path / "set.zip", {name: png()})
    images, _, _ = load(path)
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(picture()))


def test_a_zip_may_hold_folders_and_a_file_without_a_name(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"folder/": b"", "z.png": png(), "?.txt": b""})
    path.write_bytes(path.read_bytes().replace(b"?.txt", b"\0.txt"))  # cut at the zero byte
    assert load(path)[0].shape == (1, 3, 8, 12)


def test_gray_stays_one_channel_unless_colour_is_asked_for(tmp_path):
    gray = picture().convert("L")
    gray.save(tmp_path / "a.png")
    images, _, _ = load(tmp_path)
    colour, _, _ = load(tmp_path, channels=3)
    assert np.array_equal(images[0, 0], np.asarray(gray))
    assert torch.equal(colour, images.repeat(1, 3, 1, 1))


def test_one_colour_image_makes_the_set_colour_unless_gray_is_asked_for(tmp_path):
    picture(0).convert("L").save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    assert load(tmp_path)[0].shape == (2, 3, 8, 12)
    assert load(tmp_path, channels=1)[0].shape == (2, 1, 8, 12)


@pytest.mark.parametrize("size, shape", [(16, (16, 16)), ((6,), (6, 6)), ([8, 24], (8, 24))])
def test_images_come_at_the_size_asked_for_one_number_or_height_and_width(
    tmp_path, size, shape
):
    picture(0, width=12).save(tmp_path / "a.png")
    picture(1, width=30).save(tmp_path / "b.png")
    images, _, _ = load(tmp_path, size=size)
    assert images.shape == (2, 3, *shape)


# Arrays


def test_uint8_arrays_may_have_their_channels_first_last_or_none(tmp_path):
    first = random_bytes((5, 3, 8, 6))
    last = first.transpose(0, 2, 3, 1)
    gray = first[:, 0]
    for array, expected in ((first, first), (last, first), (gray, first[:, :1])):
        np.savez(tmp_path / "a.npz", images=array)
        images, _, _ = load(tmp_path / "a.npz")
        assert np.array_equal(images, expected), f"{array.shape} was read in another order"


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_integers_as_many_as_images_are_their_labels(tmp_path, shape):
    labels = np.arange(5).reshape(shape) % 2
    np.savez(tmp_path / "a.npz", images=random_bytes((5, 8, 8)), y=labels)
    _, found, names = load(tmp_path / "a.npz")
    assert found.tolist() == [0, 1, 0, 1, 0]
    assert names == ["0", "1"]


def test_of_several_arrays_the_training_images_are_taken_or_none(tmp_path):
    a = np.zeros((5, 8, 8, 3), np.uint8)
    b = np.ones((7, 8, 8, 3), np.uint8)
    tests = dict(x_test=a, y_test=np.arange(5)[:, None])
    training = dict(x_train=b, y_train=np.arange(7)[:, None] % 3)
    np.savez(tmp_path / "keras.npz", **tests, **training)
    images, labels, _ = load(tmp_path / "keras.npz")
    assert len(images) == 7
    assert images.min() == 1
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.savez(tmp_path / "two.npz", a=a, b=b)
    assert "several arrays of images, a, b" in refusal(tmp_path / "two.npz")


def test_arrays_are_resized_and_turned_gray_or_colour_like_image_files(tmp_path):
    image = picture(width=16, height=16)
    image.save(tmp_path / "a.png")
    np.save(tmp_path / "colour.npy", np.asarray(image)[None])
    np.save(tmp_path / "gray.npy", np.asarray(image.convert("L"))[None])
    for channels in (1, 3):
        expected, _, _ = load(tmp_path, size=(8, 4), channels=channels)
        images, _, _ = load(tmp_path / "colour.npy", size=(8, 4), channels=channels)
        assert torch.equal(images, expected)
    thin, _, _ = load(tmp_path / "gray.npy", size=(1, 8), channels=3)
    assert thin.shape == (1, 3, 1, 8)


def test_images_one_pixel_wide_keep_their_channels(tmp_path):
    array = np.full((1, 8, 1, 3), [10, 20, 30], np.uint8)
    np.save(tmp_path / "thin.npy", array)
    images, _, _ = load(tmp_path / "thin.npy", size=4)
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    np.save(tmp_path / "thin.npy", array[..., 0])
    assert load(tmp_path / "thin.npy", size=4)[0].shape == (1, 1, 4, 4)
    np.save(tmp_path / "low.npy", np.arange(8, dtype=np.uint8).reshape(1, 1, 8))
    images, _, _ = load(tmp_path / "low.npy", size=(1, 4))
    assert images.tolist() == [[[[2, 3, 4, 5]]]], "the middle of 0 to 7"


def test_float_arrays_are_latents_and_come_back_as_they_are(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    images, labels, _ = load(tmp_path / "a.npy")
    assert images.dtype == torch.float32
    assert np.array_equal(images, array.astype(np.float32))
    assert labels is None
    assert "used as they are" in refusal(tmp_path / "a.npy", size=4)
    array[1, 2, 3, 4] = np.nan
    np.save(tmp_path / "a.npy", array)
    assert "not finite" in refusal(tmp_path / "a.npy")


def test_a_member_of_an_npz_that_is_no_array_file_is_left_alone(tmp_path):
    np.savez(tmp_path / "a.npz", images=random_bytes((5, 8, 8)))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("README.txt", "about these images")
    assert load(tmp_path / "a.npz")[0].shape == (5, 1, 8, 8)


@pytest.mark.parametrize("pack, ending", [(bytes, ""), (gzip.compress, ".gz")])
def test_mnist_files_are_read_with_their_labels_and_padded_to_32(tmp_path, pack, ending):
    array = random_bytes((4, 28, 28))
    file = write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", array, pack)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{ending}", array[:2], pack)
    labels_file = tmp_path / f"train-labels-idx1-ubyte{ending}"
    write_idx(labels_file, np.array([7, 0, 2, 1]), pack)
    for source in (tmp_path, file):
        images, labels, _ = load(source)
        assert images.shape == (4, 1, 32, 32)
        assert np.array_equal(images[:, 0, 2:-2, 2:-2], array)
        assert images.sum() == array.sum(), "the padding is not black"
        assert labels.tolist() == [7, 0, 2, 1]
    assert np.array_equal(load(tmp_path, size=28)[0][:, 0], array)


def cifar(labels):
    """Images (N, 3, 32, 32), and the records that CIFAR-10's binary version has of them."""
    array = random_bytes((len(labels), 3, 32, 32))
    records = [bytes([y]) + image.tobytes() for y, image in zip(labels, array)]
    return array, b"".join(records)


def test_the_binary_archive_of_cifar_10_is_read(tmp_path):
    array, raw = cifar([0, 1, 0, 1, 1, 0])
    contents = {
        "cifar-10-batches-bin/data_batch_2.bin": raw[3073 * 4:],
        "cifar-10-batches-bin/data_batch_1.bin": raw[:3073 * 4],
        "cifar-10-batches-bin/test_batch.bin": raw,
        "cifar-10-batches-bin/batches.meta.txt": b"cat\ndog\n",
    }
    images, labels, names = load(write_tar(tmp_path / "cifar-10-binary.tar.gz", contents))
    assert np.array_equal(images, array)
    assert labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert names == ["cat", "dog"]


def test_the_batches_of_cifar_10_are_read_from_their_folder_or_one_by_one(tmp_path):
    array, raw = cifar([0, 1, 2, 1])
    (tmp_path / "data_batch_1.bin").write_bytes(raw[:3073])
    (tmp_path / "data_batch_2.bin").write_bytes(raw[3073:])
    images, labels, names = load(tmp_path)
    assert np.array_equal(images, array)
    assert labels.tolist() == [0, 1, 2, 1]
    assert names == ["0", "1", "2"]
    assert len(load(tmp_path / "data_batch_2.bin")[0]) == 3


def test_the_word_digits_names_the_built_in_set(monkeypatch):
    monkeypatch.setattr(datasets, "digits", lambda size, channels: ((size, channels), "labels"))
    assert load("digits")[:2] == (((32, 32), 3), "labels")
    assert load("digits64")[:2] == (((64, 64), 3), "labels")
    images, _, names = load("digits", size=(16, 24), channels=1)
    assert images == ((16, 24), 1)
    assert names == list("0123456789")


# What is held out


@pytest.mark.parametrize("total, most", [(40, 2), (1000, 50), (10_000, 128)])
def test_up_to_128_images_of_every_class_are_held_out_and_not_trained_on(total, most):
    images = torch.arange(total).view(total, 1, 1, 1)
    labels = torch.arange(10).repeat_interleave(total // 10)  # as a folder's images come
    (trained_on, _), (held_out, classes) = hold_out(images, labels, 0)
    both = torch.cat([trained_on, held_out]).flatten().sort().values
    assert len(held_out) == most, "a twentieth, and at most 128"
    assert torch.equal(both, images.flatten()), "an image is in both parts, or in none"
    assert torch.equal(classes, labels[held_out.flatten()]), "labels of other images"
    assert len(classes.unique()) == min(10, most), "one class fills what is held out"


def test_an_overfitted_part_has_images_of_every_class_and_is_measured_on_itself():
    images = torch.arange(1000).view(1000, 1, 1, 1)
    labels = torch.arange(10).repeat_interleave(100)
    (trained_on, classes), (held_out, _) = hold_out(images, labels, 50)
    assert len(trained_on.unique()) == 50
    assert len(classes.unique()) == 10
    assert torch.equal(held_out, trained_on)
    assert torch.equal(hold_out(images, labels, 5000)[0][0], images)


def test_a_handful_of_images_is_all_trained_on_and_needs_no_labels():
    images = torch.arange(39).view(39, 1, 1, 1)
    (trained_on, labels), (held_out, held_out_labels) = hold_out(images, None, 0)
    assert torch.equal(trained_on, images)
    assert torch.equal(held_out, images)
    assert labels is None
    assert held_out_labels is None


def test_evenly_spaced_indices_hold_both_ends_and_no_more_than_there_are():
    assert evenly(3, 11).tolist() == [0, 5, 10]
    assert evenly(5, 3).tolist() == [0, 1, 2]


# Images for a checkpoint


def checkpoint_of(shape, classes=(), data="set.npz", **more):
    config = dict(data=data)
    return dict(shape=list(shape), classes=list(classes), config=config, **more)


def test_images_for_a_checkpoint_take_its_shape_and_only_its_classes(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=random_bytes((4, 8, 8, 3)), y=np.array([0, 1, 1, 0]))
    images, labels = load_like(checkpoint_of((1, 4, 6), ["0", "1"]), path)
    assert images.shape == (4, 1, 4, 6)
    assert labels.tolist() == [0, 1, 1, 0]
    _, labels = load_like(checkpoint_of((3, 8, 8)), path)
    assert labels is None, "a model without classes takes no labels"
    with pytest.raises(UserError, match="knows the classes cat, dog; .* has 0, 1"):
        load_like(checkpoint_of((3, 8, 8), ["cat", "dog"]), path)


def test_latents_for_a_checkpoint_must_have_its_shape_already(tmp_path):
    path = tmp_path / "set.npy"
    np.save(path, np.zeros((3, 4, 8, 8), np.float32))
    images, _ = load_like(checkpoint_of((4, 8, 8), latents=True), path)
    assert images.shape == (3, 4, 8, 8)
    with pytest.raises(UserError, match="holds 4x8x8, the model was trained on 4x4x4"):
        load_like(checkpoint_of((4, 4, 4), latents=True), path)


def test_a_run_whose_data_has_gone_says_that_other_data_may_be_named():
    with pytest.raises(UserError, match="nothing-here .the images of this run; --data names"):
        load_like(checkpoint_of((3, 8, 8), data="nothing-here"), "nothing-here")
    with pytest.raises(UserError, match="nothing-here$"):
        load_like(checkpoint_of((3, 8, 8), data="digits"), "nothing-here")


# What cannot be used is refused by name: sources and sizes


def test_a_source_that_is_missing_empty_or_of_no_known_kind_is_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nothing-here")
    assert "no data set is named" in refusal("")
    (tmp_path / "a.docx").write_text("")
    assert "a.docx: give a folder or .zip" in refusal(tmp_path / "a.docx")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    assert "it is empty" in refusal(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "Makefile").write_text("")
    assert "found only .txt, no suffix" in refusal(tmp_path)


def test_a_folder_named_like_an_archive_is_read_as_the_folder_it_is(tmp_path):
    for name in ("x.zip", "x.npz", "x.tar.gz"):
        (tmp_path / name).mkdir()
        assert f"no images in {tmp_path / name}: it is empty" in refusal(tmp_path / name)


@pytest.mark.parametrize("size", [0, -1, (8, 0), (), (1, 2, 3), (8193,), 10 ** 30])
def test_a_size_that_is_none_or_beyond_reason_is_refused(tmp_path, size):
    picture().save(tmp_path / "a.png")
    for source in (tmp_path, "digits"):
        assert refusal(source, size=size).startswith("size must be")


def test_channels_are_1_or_3():
    assert refusal("digits", channels=2) == "channels must be 1 or 3, got 2"


def test_images_of_several_sizes_are_refused_with_the_flag_that_helps(tmp_path):
    picture(width=8).save(tmp_path / "a.png")
    picture(width=9).save(tmp_path / "b.png")
    assert "a.png is 8x8, b.png 9x8): choose one, for example --size 64" in refusal(tmp_path)


def test_names_with_newlines_or_stray_bytes_stay_on_one_line(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"a\nb.png": b"no image"})
    assert r"a\nb.png" in refusal(path)
    path = write_zip(tmp_path / "set.zip", {"a/0.png": png(), "b\nc/0.png": png()})
    _, _, names = load(path)
    assert names == ["a", r"b\nc"]
    assert r"stray\udc80" in refusal(tmp_path / "stray\udc80")
    assert r"line\nbreak" in refusal(tmp_path / "line\nbreak")


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path):
    """A folder in its place: opening it fails for every user and on every system."""
    for name in ("train-images-idx3-ubyte", "data_batch_1.bin"):
        (tmp_path / name).mkdir()
        assert "cannot read" in refusal(tmp_path)
        (tmp_path / name).rmdir()


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path):
    for name in ("a.png", "a.npy", "a.zip", "data_batch_1.bin", "idx3-ubyte"):
        path = tmp_path / name
        path.write_bytes(png())
        path.chmod(0)
        try:
            path.read_bytes()
            pytest.skip("this user, or this system, reads files whatever their mode")
        except PermissionError:
            source = tmp_path if name == "a.png" else path
            assert "Permission denied" in refusal(source)
        path.chmod(0o600)
        path.unlink()


def test_a_link_to_nothing_is_no_data_set_and_no_image(tmp_path):
    link = tmp_path / "link.png"
    try:
        link.symlink_to(tmp_path / "nothing-here")
    except OSError:
        pytest.skip("this system lets this user make no links")
    assert "no such file or folder" in refusal(link)
    assert "no images" in refusal(tmp_path)


# What cannot be used: damaged and hostile files


def test_a_cut_off_image_in_a_folder_or_zip_is_refused_by_name(tmp_path):
    (tmp_path / "good.png").write_bytes(png(width=64))
    (tmp_path / "short.png").write_bytes(png(width=64)[:500])
    assert "short.png" in refusal(tmp_path)
    path = write_zip(tmp_path / "set.zip", {"good.png": png(), "short.png": png()[:200]})
    assert "cannot read short.png" in refusal(path)


def test_a_broken_zip_and_one_that_points_outside_are_refused(tmp_path):
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK\3\4 no zip at all")
    assert "set.zip" in refusal(path)
    for name in ("../evil.png", "/evil.png", "C:evil.png", r"a\..\evil.png"):
        contents = {"good.png": png(), name: b"x"}
        assert "points outside it" in refusal(write_zip(path, contents))


@pytest.mark.parametrize("ending, inside", [("zip", "a.png"), ("npz", "a.npy")])
@pytest.mark.parametrize("at, value, word", [(6, 1, "encrypted"), (8, 99, "compression")])
def test_zips_that_are_encrypted_or_packed_in_an_unknown_way_are_refused(
    tmp_path, ending, inside, at, value, word
):
    """Both headers of the entry have the flags and the method, the second 2 bytes later."""
    path = write_zip(tmp_path / f"set.{ending}", {inside: png()})
    content = bytearray(path.read_bytes())
    content[at] = value
    content[content.index(b"PK\1\2") + at + 2] = value
    path.write_bytes(content)
    text = refusal(path)
    assert inside in text
    assert word in text


def test_no_object_of_python_is_ever_unpickled(tmp_path):
    objects = np.array([{}, []], dtype=object)
    np.save(tmp_path / "a.npy", objects)
    assert "never unpickled" in refusal(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", images=random_bytes((2, 8, 8)), more=objects)
    assert "more.npy" in refusal(tmp_path / "a.npz")
    pickles = {"cifar-10-batches-py/data_batch_1": b""}
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", pickles)
    assert "its Python version is never unpickled here" in refusal(path)


def test_array_files_that_are_none_or_are_damaged_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.npz", {"images.npy": b"no array"})
    assert "images.npy" in refusal(path)
    assert "no array" in refusal(write_zip(path, {"images.txt": b"no array"}))
    array = tmp_path / "a.npy"
    np.save(array, random_bytes((4, 8, 8)))
    whole = array.read_bytes()
    for damaged in (whole[:5], whole[:40], whole[:-9], whole.replace(b"descr", b"d\0scr")):
        array.write_bytes(damaged)
        assert "a.npy" in refusal(array)


@pytest.mark.parametrize("shape", [(10 ** 9, 3, 1024, 1024), (2 ** 62, 4, 4), (-1, 8, 8)])
def test_a_header_that_tells_of_more_than_the_file_holds_is_not_believed(tmp_path, shape):
    path = write_npy(tmp_path / "endless.npy", shape, bytes(64))
    assert "endless.npy: its header tells of uint8" in refusal(path)
    inside = write_zip(tmp_path / "a.npz", {"x.npy": path.read_bytes()})
    assert "its header tells of uint8" in refusal(inside)


@pytest.mark.parametrize("array", [
    np.zeros((4, 4)),
    np.zeros((4, 8, 8), np.int32),
    np.zeros((0, 8, 8), np.uint8),
    np.zeros((1, 1, 1, 8, 8), np.uint8),
])
def test_an_array_that_holds_no_images_is_refused_with_what_it_holds(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    text = refusal(tmp_path / "a.npy")
    assert f"it holds {array.dtype} {array.shape}" in text


def test_an_array_of_two_channels_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", random_bytes((5, 2, 8, 8)))
    assert "neither 1 nor 3 channels" in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("label", [-1, 10_000, 2 ** 62])
def test_labels_below_0_or_beyond_9999_are_refused(tmp_path, label):
    labels = np.array([0, 1, label])
    np.savez(tmp_path / "a.npz", images=random_bytes((3, 8, 8)), y=labels)
    assert "they must be 0 to 9,999" in refusal(tmp_path / "a.npz")


def test_idx_files_that_are_cut_off_empty_or_of_other_bytes_are_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    whole = write_idx(path, random_bytes((4, 8, 8))).read_bytes()
    wrong_type = whole.replace(bytes([0, 0, 8, 3]), bytes([0, 0, 13, 3]))
    for content in (whole[:8], whole[:-1], whole + b"x", wrong_type, b""):
        path.write_bytes(content)
        assert "not a whole idx file" in refusal(tmp_path)
    write_idx(path, np.zeros((0, 28, 28)))
    assert "holds no images" in refusal(tmp_path)
    packed = tmp_path / "idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(whole)[:-12])
    assert "idx3-ubyte.gz" in refusal(packed)


@pytest.mark.parametrize("labels", [[1, 2, 3], [1, 2, 3, 4, 5], []])
def test_idx_labels_must_be_as_many_as_the_images(tmp_path, labels):
    write_idx(tmp_path / "train-images-idx3-ubyte", random_bytes((4, 8, 8)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array(labels))
    assert f"has {len(labels)} labels, not 4" in refusal(tmp_path)


def test_labels_of_cifar_10_beyond_its_names_are_refused(tmp_path):
    _, raw = cifar([0, 2])
    (tmp_path / "data_batch_1.bin").write_bytes(raw)
    (tmp_path / "batches.meta.txt").write_bytes(b"cat\ndog\n")
    assert "the label 2, but names for 2 classes only" in refusal(tmp_path)


@pytest.mark.parametrize("cut", [0, 100, 3073, 5000])
def test_archives_and_batches_of_cifar_10_that_are_cut_off_are_refused(tmp_path, cut):
    _, raw = cifar([0, 1])
    path = write_tar(tmp_path / "cifar.tar.gz", {"data_batch_1.bin": raw})
    path.write_bytes(path.read_bytes()[:cut])
    assert "cifar.tar.gz" in refusal(path)
    (tmp_path / "data_batch_1.bin").write_bytes(raw[:-1])
    assert "not CIFAR-10's binary version" in refusal(tmp_path / "data_batch_1.bin")


# What would not fit in memory is refused before it is asked for


def test_a_size_at_which_the_images_would_not_fit_is_refused_before_they_are_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pixels, "memory", lambda: 1e8)
    monkeypatch.setattr(datasets, "fit", None)  # an image resized would raise TypeError
    (tmp_path / "a.png").write_bytes(png())
    np.save(tmp_path / "a.npy", random_bytes((1, 8, 8, 3)))
    for source in (tmp_path, tmp_path / "a.npy", "digits"):
        assert "choose a smaller --size" in refusal(source, size=8192)


def test_what_unpacks_to_more_than_the_machine_can_hold_is_refused(tmp_path, monkeypatch):
    zeros = np.zeros((40, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "bomb.npz", zeros)
    np.save(tmp_path / "bomb.npy", zeros)
    few = zeros[:5]  # a quarter of the memory each
    np.savez_compressed(tmp_path / "several.npz", few, few, few)
    write_idx(tmp_path / "bomb-idx3-ubyte.gz", zeros[..., 0], gzip.compress)
    write_tar(tmp_path / "bomb.tar.gz", {"data_batch_1.bin": bytes(3073 * 40)})
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073 * 40))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", bytes(100_000))
    monkeypatch.setattr(pixels, "memory", lambda: 60_000)
    monkeypatch.setattr(datasets, "LARGEST_FILE", 50_000)
    for path in sorted(tmp_path.iterdir()):
        text = refusal(path)
        assert "unpacks to" in text, f"{path.name}: {text}"
