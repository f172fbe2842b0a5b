import pytest
import torch

from plumbing import images as pixels
from plumbing.digits import digits
from plumbing.flags import UserError


def test_digits_are_the_same_for_the_same_seed_and_other_ones_for_another():
    images, labels = digits(count=60)
    again, labels_again = digits(count=60)
    other, _ = digits(count=60, seed=1)
    assert torch.equal(images, again), "the same seed drew other images"
    assert torch.equal(labels, labels_again), "the same seed drew other labels"
    assert not torch.equal(images, other), "another seed drew the same images"


def test_digits_hold_every_class_equally():
    images, labels = digits(count=200)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [20] * 10


@pytest.mark.parametrize("size, channels", [((16, 16), 3), ((24, 48), 1), ((64, 64), 3)])
def test_digits_are_light_on_dark_and_come_at_any_size(size, channels):
    images, _ = digits(size, channels, count=20)
    lightest = images.amax(dim=(1, 2, 3))
    darkest = images.amin(dim=(1, 2, 3))
    assert images.shape == (20, channels, *size)
    assert lightest.min() > 150, "a digit is not light"
    assert darkest.max() < 140, "a background is not dark"


def test_gray_digits_are_the_mean_of_the_colours():
    colour, _ = digits(count=20)
    gray, _ = digits(channels=1, count=20)
    error = (gray.float() - colour.float().mean(1, keepdim=True)).abs().max()
    assert error <= 1, f"gray differs from the mean of red, green and blue by {error:.1f}"


def test_digits_of_one_class_look_alike_and_unlike_the_others():
    images, labels = digits(count=2000)
    x = images.float().amax(1)
    mean = x.mean((1, 2), keepdim=True)
    std = x.std((1, 2), keepdim=True)
    x = ((x - mean) / std).flatten(1)
    known = labels[:1000]
    means = torch.stack([x[:1000][known == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(x[1000:], means).argmin(1)
    right = (nearest == labels[1000:]).float().mean()
    assert right > 0.5, f"the nearest class mean names {right:.0%} of the digits, chance 10%"


def test_digits_under_8_pixels_are_refused():
    with pytest.raises(UserError, match="size of 8 or more, got 7 32"):
        digits((7, 32))


def test_digits_that_memory_cannot_hold_are_refused_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(pixels, "memory", lambda: 3e6)
    digits((64, 64), count=80)  # 0.98 MB of 1 MB
    with pytest.raises(UserError, match="1,000 images need 0.0 GB, more than a third"):
        digits((64, 64), count=1000)
