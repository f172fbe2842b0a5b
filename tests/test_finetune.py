"""Beginning with the weights of another run, by --init."""
import pytest
import tiny
import torch
from conftest import close

from plumbing import checkpoint, finetune
from plumbing.flags import UserError

OTHER = dict(attention=(0,), mults=(1, 2), T=30)
NOISY = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


@pytest.fixture
def begin(tmp_path):
    """begin(of_old, of_new) -> (the old run's averaged method, the new one, the line).

    Each is dict(method=..., classes=..., flag=value, ...), classes as many for the old run, or
    names for the new one; the old one's are "0", "1", ...
    """

    def begin(of_old, of_new):
        tiny.write_run(tmp_path / "old", **(OTHER | of_old))
        of_new = OTHER | dict(classes=[]) | of_new
        about = dict(method=of_new.pop("method"), classes=of_new.pop("classes"))
        about |= dict(config=tiny.SMALL | of_new, shape=[3, 8, 8])
        new = checkpoint.build(about)
        line = finetune.take_weights(new, tmp_path / "old", about)
        old, _ = checkpoint.load(tmp_path / "old", device="cpu")
        return old, new.eval().requires_grad_(False), line

    return begin


def test_a_run_begins_with_the_averaged_weights_of_one_like_it(begin, tmp_path):
    old, new, line = begin(dict(method="ddpm"), dict(method="ddpm"))
    expected = old.state_dict()
    for name, weight in new.state_dict().items():
        assert torch.equal(weight, expected[name])
    count = len(expected)
    assert line == f"taken from {tmp_path / 'old'}: {count} of {count} tensors"


LINEAR = dict(method="iddpm", schedule="linear")
LEARNED = dict(method="pdm", patch=(2,), learn_variance=True)


@pytest.mark.parametrize(
    "of_old, of_new",
    [
        (dict(method="ddpm"), LINEAR),
        (dict(method="pdm", patch=(2,)), LEARNED),
    ],
)
def test_a_fixed_variance_begins_as_a_learned_one_of_the_same_mean_half_way(
    begin, of_old, of_new
):
    old, new, line = begin(of_old, of_new)
    x_0_hat, v = new.x_0_and_v(NOISY, 20)
    close(x_0_hat, old.predict(NOISY, 20), rtol=1e-5, atol=1e-4)
    assert not v.any()
    mean, _, _ = new.p_mean_variance(NOISY, 20, 19)
    expected, _, _ = old.p_mean_variance(NOISY, 20, 19)
    close(mean, expected, rtol=1e-5, atol=1e-4)
    assert "; in part: net." in line
    assert "new" not in line


def test_a_learned_variance_leaves_its_mean_to_a_fixed_one(begin):
    old, new, _ = begin(LINEAR, dict(method="ddpm"))
    close(new.predict(NOISY, 20), old.predict(NOISY, 20), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("augment", [0.0, 0.2])
def test_edm_begins_as_patch_diffusion_of_the_same_denoiser_wherever_a_crop_lies(
    begin, augment
):
    of_old = dict(method="edm", augment=augment)
    old, new, line = begin(of_old, dict(method="patch_diffusion", p_full=1.0))
    expected = old.D(NOISY, 0.7)
    close(new.D(NOISY, 0.7), expected, rtol=1e-5, atol=1e-4)
    elsewhere = torch.rand(2, 2, 8, 8)
    close(new.D(NOISY, 0.7, planes=elsewhere), expected, rtol=1e-5, atol=1e-4)
    assert "; in part: net.conv_in.weight, net.straight.weight" in line


def test_labels_of_the_augmentation_do_not_begin_as_coordinates(begin):
    of_old = dict(method="patch_diffusion", p_full=1.0)
    _, new, _ = begin(of_old, dict(method="edm", augment=0.2))
    for layer in (new.net.conv_in, new.net.straight):
        assert layer.weight[:, :3].any()
        assert not layer.weight[:, 3:].any()


def test_classes_begin_as_those_of_their_names_or_as_none(begin):
    of_old = dict(method="edm", classes=2)
    old, new, line = begin(of_old, dict(method="edm", classes=["2", "1", "3"]))
    for label, label_before in ((0, -1), (1, 1), (2, -1), (-1, -1)):
        y = torch.tensor([label, label])
        expected = old.D(NOISY, 0.7, torch.tensor([label_before, label_before]))
        close(new.D(NOISY, 0.7, y), expected, rtol=1e-5, atol=1e-4)
    assert line.endswith("in part: net.label.weight")


def test_a_run_without_classes_begins_the_same_for_each_class(begin):
    old, new, line = begin(dict(method="edm"), dict(method="edm", classes=["0", "1"]))
    expected = old.D(NOISY, 0.7)
    for label in (-1, 0, 1):
        y = torch.tensor([label, label])
        close(new.D(NOISY, 0.7, y), expected, rtol=1e-5, atol=1e-4)
    assert line.endswith("new: net.label.weight")


def test_what_only_the_old_run_has_is_named(begin):
    of_old = dict(method="edm", classes=1)
    assert begin(of_old, dict(method="edm"))[2].endswith("; left: net.label.weight")


def test_pixels_of_other_patches_are_not_taken_for_each_other(begin):
    of_old = dict(method="pdm", patch=(1,))
    _, _, line = begin(of_old, dict(method="pdm", patch=(2,)))
    assert "in part" not in line
    assert "; new: net.net.conv_in.weight, net.net.conv_out.weight" in line
    assert "its network" not in line


def test_a_network_of_another_width_is_named_by_its_flags(begin):
    of_new = dict(method="ddpm", width=16, classes=["0", "2"])
    _, new, line = begin(dict(method="ddpm", classes=1), of_new)
    flags = "--width 8 --mults 1 2 --blocks 1 --attention 0 --dropout 0.0"
    assert line.endswith(f" more; its network is {flags}")
    assert "in part" not in line
    assert not new.net.conv_out.weight.any()


def test_a_run_of_which_nothing_fits_is_refused(begin):
    with pytest.raises(UserError, match="nothing in .*old fits: it is pdm, --width 8 --mults"):
        begin(dict(method="pdm", patch=(2,)), dict(method="ddpm"))
