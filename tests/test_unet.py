import pytest
import torch
from explain import close, equal, holds
from helpers import closed_form

from unet import Attention, Guided, Sinusoid, UNet, group_norm


def trained(*channels, **options):
    """A U-Net whose zero-initialised layers are filled, as training would."""
    net = UNet(*channels, **options)
    for weights in net.parameters():
        if not weights.any():
            torch.nn.init.normal_(weights, std=0.1)
    return net.eval()


@pytest.mark.function("unet", "UNet.forward")
@pytest.mark.parametrize("H, W", [(8, 8), (8, 24), (20, 12)])
def test_any_size_that_the_depth_divides_keeps_its_shape(H, W):
    net = trained(3, 5, width=8, mults=(1, 2, 3), attention=(1, 2))
    out = net(torch.randn(2, 3, H, W), torch.tensor([1.0, 999.0]))
    equal(out.shape, (2, 5, H, W))


@pytest.mark.function("unet", "UNet.check_size")
def test_a_size_that_the_depth_does_not_divide_is_refused():
    net = UNet(3, 3, width=8, mults=(1, 1, 1))
    with pytest.raises(ValueError, match="divisible by 4"):
        net(torch.randn(1, 3, 8, 10), torch.ones(1))


@pytest.mark.function("unet", "UNet.__init__")
def test_the_output_is_exactly_zero_before_training():
    out = UNet(3, 6, width=8)(torch.randn(2, 3, 8, 8), torch.ones(2))
    equal(out, torch.zeros(2, 6, 8, 8))


@pytest.mark.function("unet", "UNet.__init__")
def test_fractional_multipliers_and_several_blocks_are_allowed():
    net = UNet(3, 3, width=16, mults=(1, 1.5, 2), blocks=3, attention=())
    widths = [level[-1].conv2.out_channels for level in net.down]
    equal(widths, [16, 24, 32], what="channels on the way down")
    equal([len(level) for level in net.up], [3, 3, 3], what="blocks on the way up")


@pytest.mark.function("unet", "Attention.__init__")
@pytest.mark.parametrize("channels, heads", [
    (8, 1), (64, 1), (128, 2), (200, 2), (256, 4), (193, 1),
])
def test_attention_has_a_head_for_64_channels_or_as_divides_them(channels, heads):
    net = Attention(channels)
    equal(net.heads, heads)
    equal(net(torch.randn(1, channels, 2, 2)).shape, (1, channels, 2, 2))


@pytest.mark.function("unet", "UNet.__init__")
def test_the_last_block_of_a_level_on_the_way_up_gives_the_next_level_s_width():
    net = UNet(3, 3, width=16, mults=(1, 1.5, 2), blocks=2)
    widths = [[block.conv2.out_channels for block in level] for level in net.up]
    equal(widths, [[32, 24], [24, 16], [16, 16]])


@pytest.mark.function("unet", "Attention.forward")
@pytest.mark.parametrize("attention", [(0,), (1,)])
def test_with_attention_every_output_sees_every_input(attention):
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    net = trained(1, 1, width=8, mults=(1, 1), attention=attention)
    net(x, torch.ones(1))[0, 0, 0, 0].backward()
    reach = x.grad[0, 0, 31, 31]
    holds(reach != 0, "the first pixel out depends on the last pixel in", gradient=reach)


@pytest.mark.function("unet", "Sinusoid.forward")
@pytest.mark.parametrize("values", [
    torch.arange(0, 1001.0),
    torch.arange(0, 4001.0),
    torch.linspace(-1.6, 1.1, 256),
    torch.linspace(0.03, 932, 1000),
], ids=["t of DDPM", "t of IDDPM", "ln(sigma)/4 of EDM", "c_noise of VP"])
def test_the_embedding_tells_neighbouring_noise_levels_apart(values):
    embedding = Sinusoid(64)(values)
    nearest = embedding.diff(dim=0).norm(dim=1).min()
    holds(nearest > 0.02, "neighbours are 0.02 apart", smallest_distance=nearest)
    nearest = torch.pdist(embedding[::len(values) // 250]).min()
    holds(nearest > 0.02, "any two are 0.02 apart", smallest_distance=nearest)


@pytest.mark.function("unet", "Sinusoid.forward")
def test_the_noise_level_stays_float32_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        a, b = Sinusoid(64)(torch.tensor([999.0, 1000.0]))
    equal(a.dtype, torch.float32)
    apart = (a - b).norm()
    holds(apart > 0.1, "999 and 1000 are told apart", distance=apart)


@pytest.mark.function("unet", "UNet.forward")
def test_gate_and_scale_say_how_much_each_path_counts():
    net = trained(3, 5, width=8)
    x = torch.randn(2, 3, 8, 8)
    straight = torch.einsum("oc,bchw->bohw", net.straight.weight[:, :, 0, 0], x)
    straight = straight + net.straight.bias[:, None, None]

    def out(gate, scale):
        for layer, bias in ((net.gate, gate), (net.scale, scale)):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, bias)
        return net(x, torch.tensor([1.0, 9.0]))

    close(out(3, -1), 3 * straight, 1e-5, 1e-5, what="gate 3, scale 1 - 1")
    close(out(1, 1), straight + 2 * out(0, 0), 1e-5, 1e-5, what="gate 1, scale 1 + 1")


@pytest.mark.function("unet", "GroupNorm.forward")
def test_norms_stay_in_the_precision_of_their_weights_under_bf16_autocast():
    norm = group_norm(32)
    x = torch.randn(2, 32, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
    equal(normed.dtype, torch.float32)
    close(normed, norm(x.float()))


@pytest.mark.function("unet", "UNet.embedding")
def test_the_noise_level_and_the_class_both_reach_the_output():
    net = trained(1, 1, width=8, classes=3)
    x = torch.randn(1, 1, 8, 8)

    def out(t, y):
        return net(x, torch.tensor([t]), torch.tensor([y]))

    by_noise = (out(5.0, 0) - out(6.0, 0)).abs().max()
    by_class = (out(5.0, 0) - out(5.0, 1)).abs().max()
    holds(by_noise > 1e-4, "another noise level gives another output", apart=by_noise)
    holds(by_class > 1e-4, "another class gives another output", apart=by_class)


@pytest.mark.function("unet", "UNet.embedding")
def test_no_class_is_minus_one_or_none():
    net = trained(1, 1, width=8, classes=3)
    x = torch.randn(2, 1, 8, 8)
    t = torch.ones(2)
    without = net(x, t)
    equal(net(x, t, torch.tensor([-1, -1])), without, what="y = -1 is as y = None")
    with_class_2 = net(x, t, torch.tensor([2, 2]))
    mixed = net(x, t, torch.tensor([-1, 2]))
    close(mixed[0], without[0], rtol=1e-4, atol=1e-5, what="the image without a class")
    close(mixed[1], with_class_2[1], rtol=1e-4, atol=1e-5, what="the image with class 2")


@pytest.mark.function("unet", "Guided.forward")
@pytest.mark.parametrize("w, expected", [(0.0, 3.0), (1.0, 5.0), (2.5, 8.0)])
def test_guidance_goes_w_times_from_the_unconditional_to_the_conditional(w, expected):
    def fn(x, t, y):
        mean, v = (3.0, 10.0) if y is None else (5.0, 20.0)
        return torch.cat([torch.full_like(x, mean), torch.full_like(x, v)], dim=1)

    net = Guided(closed_form(fn)(2, 4), w)
    out = net(torch.zeros(1, 2, 4, 4), torch.ones(1), torch.zeros(1).long())
    equal(out[:, :2], torch.full((1, 2, 4, 4), expected), what="the guided output")
    equal(out[:, 2:], torch.full((1, 2, 4, 4), 20.0), what="the variance, the conditional one")
