import pytest
import torch
from conftest import close, closed_form

from unet import Attention, Guided, Sinusoid, UNet


def trained(*args, **kw):  # a U-Net whose zero-initialised layers are filled, as training would
    net = UNet(*args, **kw)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.mark.parametrize("H, W", [(8, 8), (8, 24), (20, 12)])
def test_any_size_that_the_depth_divides_keeps_its_shape(H, W):
    net = trained(3, 5, width=8, mults=(1, 2, 3), attention=(1, 2))
    assert net(torch.randn(2, 3, H, W), torch.tensor([1.0, 999.0])).shape == (2, 5, H, W)


def test_a_size_that_the_depth_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(3, 3, width=8, mults=(1, 1, 1))(torch.randn(1, 3, 8, 10), torch.ones(1))


def test_the_output_is_exactly_zero_before_training():
    assert not UNet(3, 6, width=8)(torch.randn(2, 3, 8, 8), torch.ones(2)).any()


def test_fractional_multipliers_and_several_blocks_are_allowed():
    net = UNet(3, 3, width=16, mults=(1, 1.5, 2), blocks=3, attention=())
    assert [level[-1].conv2.out_channels for level in net.down] == [16, 24, 32]
    assert [len(level) for level in net.up] == [3, 3, 3]


@pytest.mark.parametrize("channels, heads", [(8, 1), (64, 1), (128, 2), (200, 2), (256, 4), (193, 1)])
def test_attention_has_a_head_for_every_64_channels_or_as_many_as_divide_them(channels, heads):
    net = Attention(channels)
    assert net.heads == heads and net(torch.randn(1, channels, 2, 2)).shape == (1, channels, 2, 2)


def test_the_last_block_of_a_level_on_the_way_up_gives_the_next_level_s_width():
    net = UNet(3, 3, width=16, mults=(1, 1.5, 2), blocks=2)
    assert [[block.conv2.out_channels for block in level] for level in net.up] == [[32, 24], [24, 16], [16, 16]]


def test_with_attention_at_its_lowest_level_every_output_sees_every_input():
    def reach(attention):
        x = torch.randn(1, 1, 32, 32, requires_grad=True)
        trained(1, 1, width=8, mults=(1, 1), attention=attention)(x, torch.ones(1))[0, 0, 0, 0].backward()
        return x.grad[0, 0, 31, 31] != 0
    assert reach((1,)) and reach((0,))


@pytest.mark.parametrize("values", [
    torch.arange(0, 1001.0), torch.arange(0, 4001.0), torch.linspace(-1.6, 1.1, 256), torch.linspace(0.03, 932, 1000)],
    ids=["t of DDPM", "t of IDDPM", "ln(sigma)/4 of EDM", "c_noise of VP"])
def test_the_embedding_tells_neighbouring_noise_levels_apart(values):
    embedding = Sinusoid(64)(values)
    assert (embedding.diff(dim=0).norm(dim=1) > 0.02).all()
    assert torch.pdist(embedding[:: len(values) // 250]).min() > 0.02


def test_the_noise_level_stays_float32_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        a, b = Sinusoid(64)(torch.tensor([999.0, 1000.0]))
    assert a.dtype == torch.float32 and (a - b).norm() > 0.1


def test_the_noise_level_and_the_class_both_reach_the_output():
    net, x = trained(1, 1, width=8, classes=3), torch.randn(1, 1, 8, 8)
    out = [net(x, torch.tensor([float(t)]), torch.tensor([y])) for t, y in ((5, 0), (6, 0), (5, 1))]
    assert (out[0] - out[1]).abs().max() > 1e-4 and (out[0] - out[2]).abs().max() > 1e-4


def test_no_class_is_minus_one_or_none():
    net, x, t = trained(1, 1, width=8, classes=3), torch.randn(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(net(x, t), net(x, t, torch.tensor([-1, -1])))
    mixed = net(x, t, torch.tensor([-1, 2]))
    close(mixed[0], net(x, t)[0], rtol=1e-4, atol=1e-5)
    close(mixed[1], net(x, t, torch.tensor([2, 2]))[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w, expected", [(0.0, 3.0), (1.0, 5.0), (2.5, 8.0)])
def test_guidance_goes_w_times_from_the_unconditional_to_the_conditional_output(w, expected):
    def fn(x, t, y):
        mean = torch.full_like(x, 3.0 if y is None else 5.0)
        return torch.cat([mean, torch.full_like(x, 10.0 if y is None else 20.0)], dim=1)
    out = Guided(closed_form(fn)(2, 4), w)(torch.zeros(1, 2, 4, 4), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert (out[:, :2] == expected).all() and (out[:, 2:] == 20).all()   # the learned variance stays the conditional one
