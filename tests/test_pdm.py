import math

import pytest
import torch
from explain import close, equal, holds, mean_within, own_noise, within
from helpers import (
    Gaussian,
    asks_and_teaches,
    closed_form,
    cosine_alpha_bar,
    images,
    last,
    level,
    linear_alpha_bar,
    same_net,
    tensor,
    watched,
)

from edm import denoiser, ode_sample
from pdm import PDM, patchify, posterior_mean, unpatchify
from unet import Guided, UNet

ab = cosine_alpha_bar()
WEIGHTS = ("1", "sqrt_snr", "snr", "snr+1", "truncated", "p2")


def oracle(data, predict="x", factor=1.0, **options):
    """PDM at P = 1 whose network says the target of `factor` times the optimal x."""

    def fn(z, t, y):
        alpha = ab[t.long()]
        x = factor * data.x_0(z, alpha)
        eps = (z - alpha.sqrt() * x) / (1 - alpha).sqrt()
        return targets(x, eps, alpha)[predict]

    return PDM(closed_form(fn), 1, patch=1, predict=predict, **options)


def targets(x, eps, alpha):
    return {"x": x, "eps": eps, "v": alpha.sqrt() * eps - (1 - alpha).sqrt() * x}


# Patches

@pytest.mark.function("pdm", "patchify", "unpatchify")
@pytest.mark.parametrize("P, H, W", [
    (1, 5, 7), (2, 8, 8), (4, 8, 16), (8, 16, 8), (3, 9, 12), (5, 10, 10),
])
def test_the_patch_round_trip_is_exact(P, H, W):
    x = torch.randn(2, 3, H, W)
    patches = patchify(x, P)
    equal(patches.shape, (2, 3 * P * P, H // P, W // P), what="shape of the patches")
    equal(unpatchify(patches, P), x, what="the image again")


@pytest.mark.function("pdm", "patchify")
@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("j", [0, 1, 2])
def test_a_patch_is_the_p_by_p_block_of_pixels_under_its_grid_cell(i, j):
    x = torch.arange(3 * 8 * 12.0).view(1, 3, 8, 12)  # each pixel its own number
    block = x[0, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].flatten()
    channels = patchify(x, 4)[0, :, i, j].sort().values
    equal(channels, block, what=f"the pixels in the channels of cell {i}, {j}, sorted")


@pytest.mark.function("pdm", "Patched.forward")
def test_the_network_sees_c_p_squared_channels_on_a_grid_p_times_coarser():
    net, calls = watched(lambda x, t, y: torch.cat([x, x], dim=1))
    PDM(net, 3, patch=4, learn_variance=True).loss(torch.randn(2, 3, 32, 16))
    equal([tuple(call.x.shape) for call in calls], [(2, 48, 8, 4)])


@pytest.mark.function("pdm", "PDM.__init__")
@pytest.mark.parametrize("learn_variance, factor", [(False, 1), (True, 2)])
@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
def test_a_network_on_patches_has_p_squared_the_channels(P, learn_variance, factor):
    asked = []

    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return torch.nn.Identity()

    PDM(make_net, 3, patch=P, learn_variance=learn_variance)
    equal(asked, [(3 * P**2, factor * 3 * P**2)], what="the network's channels in and out")


@pytest.mark.function("pdm", "PDM.__init__")
@pytest.mark.parametrize("split_snr, networks", [((), 1), ((0.25,), 2)])
def test_a_checkpoint_holds_what_was_learned_and_nothing_else(split_snr, networks):
    def make_net(c_in, c_out):
        return torch.nn.Conv2d(c_in, c_out, 1, bias=False)

    weights = PDM(make_net, 3, split_snr=split_snr).state_dict().values()
    equal([tuple(w.shape) for w in weights], [(48, 48, 1, 1)] * networks)


@pytest.mark.function("pdm", "PDM.__init__")
def test_x_0_hat_is_clipped_by_default():
    equal(PDM(same_net, 3).clip, True)
    equal(PDM(same_net, 3).dynamic_clip, False)


@pytest.mark.function("pdm", "PDM.clip_if_asked")
@pytest.mark.parametrize("side", [7, 10])
def test_dynamic_clipping_makes_the_quantile_of_each_image_its_white(side):
    n = side * side
    shuffled = torch.randperm(n).view(1, 1, side, side)
    sign = 1 - 2 * (shuffled % 2)
    x = torch.cat([sign * (1 + shuffled) * scale for scale in (0.5, 1.0)]).double()
    s = 1 + round(0.995 * (n - 1))  # of 1, 2, ..., n the one nearest to the .995 quantile
    came = PDM(same_net, 1, dynamic_clip=True).clip_if_asked(x)
    expected = x.div(x.new_tensor([0.5 * s, s]).view(2, 1, 1, 1)).clamp(-1, 1)
    close(came, expected, what="x_0_hat")


@pytest.mark.function("pdm", "PDM.clip_if_asked")
def test_dynamic_clipping_of_an_image_within_minus_1_to_1_is_the_plain_one():
    x = torch.linspace(-0.9, 0.9, 300).double().view(1, 3, 10, 10)
    x[0, 0, 0, 0] = -5.0
    dynamic = PDM(same_net, 3, dynamic_clip=True).clip_if_asked(x)
    equal(dynamic, PDM(same_net, 3).clip_if_asked(x))
    equal(PDM(same_net, 3, clip=False).clip_if_asked(x), x, what="x_0_hat without clipping")


@pytest.mark.function("pdm", "PDM.__init__")
def test_guidance_is_1_5_by_default():
    equal(PDM.guidance, 1.5)


@pytest.mark.function("pdm", "Patched.forward", "PDM.x_0_and_v")
def test_mean_and_variance_unfold_separately():
    net = closed_form(lambda x, t, y: torch.cat([x, torch.full_like(x, 0.5)], dim=1))
    model = PDM(net, 3, patch=4, learn_variance=True)
    x_0_hat, v = model.x_0_and_v(torch.randn(2, 3, 8, 8), 500)
    equal(x_0_hat.shape, (2, 3, 8, 8), what="shape of x_0_hat")
    expected = torch.full((2, 3, 8, 8), math.tanh(0.5))
    close(v, expected, rtol=1e-6, what="v, where the network says 0.5")
    holds((x_0_hat != 0.5).all(), "no pixel of x_0_hat is a v", x_0_hat=x_0_hat)


@pytest.mark.function("pdm", "PDM.x_0_and_v")
@pytest.mark.parametrize("var, share", [(-40.0, 0.0), (0.0, 0.5), (40.0, 1.0)])
def test_a_learned_variance_cannot_leave_its_bounds_beta_tilde_and_beta(var, share):
    net = closed_form(lambda x, t, y: torch.cat([x, torch.full_like(x, var)], dim=1))
    x = torch.zeros(1, 1, 1, 1).double()
    _, log_variance, _ = PDM(net, 1, patch=1, learn_variance=True).p_mean_variance(x, 3, 2)
    beta = 1 - ab[3] / ab[2]
    beta_tilde = (1 - ab[2]) / (1 - ab[3]) * beta
    expected = share * beta.log() + (1 - share) * beta_tilde.log()
    close(log_variance.flatten(), expected.view(1), rtol=1e-6, what="log Sigma_theta")


@pytest.mark.function("pdm", "PDM.__init__", "patch_of_each_part")
def test_a_patch_of_zero_is_refused():
    with pytest.raises(ValueError, match="patch"):
        PDM(same_net, 1, patch=0)


@pytest.mark.function("pdm", "PDM.__init__")
@pytest.mark.parametrize("options, expected", [
    ({}, 4), ({"patch": 3}, 3), ({"patch": (4, 6), "split_snr": (0.25,)}, 12),
])
def test_image_sizes_must_divide_by_every_patch(options, expected):
    equal(PDM(same_net, 1, **options).size_multiple, expected)


@pytest.mark.function("pdm", "PDM.__init__")
def test_latents_are_not_clipped_and_learn_no_variance():
    equal(PDM.latent_config, {"clip": False, "learn_variance": False})


# Targets

@pytest.mark.equation("pdm", "Training targets, x", "Training targets, eps")
@pytest.mark.equation("pdm", "Training targets, v")
@pytest.mark.function("pdm", "PDM.training_target")
@pytest.mark.parametrize("t", [1, 500, 1000])
@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_a_target_is_x_or_eps_or_sqrt_alpha_eps_minus_sigma_x(predict, t):
    x = torch.randn(4, 1, 2, 2).double()
    eps = torch.randn(4, 1, 2, 2).double()
    target = oracle(Gaussian(), predict).training_target(x, eps, t)
    close(target, targets(x, eps, ab[t])[predict], rtol=1e-12, what=f"the target {predict}")


@pytest.mark.equation("pdm", "Training targets, v", "DDPM Eq. 15")
@pytest.mark.function("pdm", "PDM.x_from_target")
@pytest.mark.parametrize("t", [1, 500, 1000])
@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_a_target_is_what_the_network_must_say_for_x_to_come_back(predict, t):
    x = torch.randn(4, 1, 2, 2).double()
    eps = torch.randn(4, 1, 2, 2).double()
    model = oracle(Gaussian(), predict)
    x_t = model.q_sample(x, t, eps)
    back = model.x_from_target(x_t, t, targets(x, eps, ab[t])[predict])
    close(back, x, rtol=1e-6, atol=1e-9, what=f"x of the target {predict}")


@pytest.mark.equation("pdm", "Training targets, v", "DDPM Eq. 15")
@pytest.mark.function("pdm", "PDM.x_from_target", "PDM.x_0_and_v")
@pytest.mark.parametrize("t", [1, 100, 500, 900])
@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_every_target_leads_back_to_the_same_x(predict, t):
    data = Gaussian()
    x_t = torch.randn(8, 1, 1, 1).double()
    x_0_hat = oracle(data, predict).predict(x_t, t)
    close(x_0_hat, data.x_0(x_t, ab[t]), rtol=1e-6, what="E[x | z_t]")


# Weights

def weight_of(alpha):
    """{name: gamma_t} of this paper's alpha_t."""
    snr = alpha / (1 - alpha)
    one = torch.ones_like(snr)
    return {
        "1": one,
        "sqrt_snr": snr.sqrt(),
        "snr": snr,
        "snr+1": 1 / (1 - alpha),
        "truncated": torch.maximum(snr, one),
        "p2": alpha / (1 - alpha).sqrt(),
    }


@pytest.mark.equation("pdm", "SNR(t)", "Loss weight")
@pytest.mark.function("pdm", "PDM.snr", "PDM.gamma")
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_weight_of_each_step_is_this_function_of_its_snr(weight):
    t = torch.tensor([1, 200, 500, 800, 1000])
    gamma = PDM(same_net, 1, patch=1, weight=weight).gamma(t)
    close(gamma, weight_of(ab[t])[weight], rtol=1e-7, what="gamma_t")


@pytest.mark.equation("pdm", "Loss weight")
@pytest.mark.function("pdm", "PDM.loss", "PDM.gamma")
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_is_the_weighted_error_in_x(weight):
    data = Gaussian()
    left = data.left(ab[1:])
    error = left + (1 - 0.9) ** 2 * (data.s**2 - left + data.mu**2)  # of 0.9 E[x | z_t]
    expected = (weight_of(ab[1:])[weight] * error).mean()
    model = oracle(data, factor=0.9, weight=weight)
    losses = torch.stack([model.loss(data.draw(5_000)) for _ in range(40)])
    mean_within(losses, expected, what="the loss of 0.9 of the optimal x")
    sharp = losses.std() / math.sqrt(40) / expected
    holds(sharp < 0.03, "this test is sharp to 3%", standard_error=sharp)


@pytest.mark.function("pdm", "PDM.loss")
def test_training_gives_each_pixel_of_each_image_a_normal_noise_of_its_own():
    net, calls = watched()
    PDM(net, 2, patch=1).loss(torch.zeros(64, 2, 4, 4).double())
    own_noise(calls[0].x / (1 - cosine_alpha_bar()[calls[0].t.long()]).sqrt())  # the image is 0


@pytest.mark.function("pdm", "PDM.loss")
def test_the_loss_asks_for_each_image_s_class_and_teaches_the_network():
    asks_and_teaches(lambda net: PDM(net, 1, patch=1))


@pytest.mark.equation("pdm", "Loss weight")
@pytest.mark.function("pdm", "PDM.loss")
def test_with_p_1_eps_and_weight_snr_it_is_iddpm_s_l_simple():
    x_0 = torch.randn(64, 1, 4, 4).double()
    net, calls = watched(lambda x, t, y: 0.3 * x)
    loss = PDM(net, 1, patch=1, predict="eps", weight="snr", T=100).loss(x_0)
    x_t = calls[0].x
    alpha = cosine_alpha_bar(100)[calls[0].t.long()]
    eps = (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()  # the noise that was drawn
    expected = (eps - 0.3 * x_t).square().mean()
    close(loss, expected, rtol=1e-6, what="the mean square error in eps")


class Free(torch.nn.Module):
    """A network whose output is its one parameter; it keeps the last input."""

    def __init__(self, out):
        super().__init__()
        self.out = torch.nn.Parameter(out)

    def forward(self, x, t, y=None):
        self.x_t = x
        self.t = t.long().view(-1, 1, 1, 1)
        return self.out


@pytest.mark.equation("pdm", "IDDPM Eq. 16")
@pytest.mark.function("pdm", "PDM.loss")
def test_a_learned_variance_adds_lambda_l_vlb_and_leaves_the_mean_alone():
    x_0 = torch.full((8, 1, 2, 2), 0.1).double()
    net = Free(torch.randn(8, 2, 2, 2).double())
    model = PDM(lambda c_in, c_out: net, 1, patch=1, learn_variance=True)
    loss = model.loss(x_0)
    loss.backward()
    root_snr = (ab[net.t] / (1 - ab[net.t])).sqrt()
    x_hat, v = net.out.detach().chunk(2, dim=1)
    L_vlb = 1000 * model.L_t(x_0, net.x_t, net.t, x_hat, v.tanh()).mean()
    expected = (root_snr * (x_0 - x_hat) ** 2).mean() + 0.001 * L_vlb
    close(loss, expected, rtol=1e-6, what="the loss")
    of_x, of_v = net.out.grad.chunk(2, dim=1)
    expected = 2 * root_snr * (x_hat - x_0) / x_0.numel()
    close(of_x, expected, rtol=1e-6, what="the gradient of x_hat, of the weighted error alone")
    holds((of_v != 0).all(), "v has a gradient everywhere", gradient=of_v)


@pytest.mark.function("pdm", "betas_of")
def test_linear0_025_ends_its_betas_at_0_025():
    alpha_bar = PDM(same_net, 1, patch=1, schedule="linear0.025").alpha_bar
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    close(betas[[0, -1]], [1e-4, 0.025], rtol=1e-7, what="beta_1 and beta_T")


@pytest.mark.function("pdm", "betas_of")
def test_linear_betas_are_ddpm_s():
    close(PDM(same_net, 1, patch=1, schedule="linear").alpha_bar, linear_alpha_bar())


# Sampler convergence on Gaussian data

@pytest.mark.function("pdm", "PDM.x_from_target")
@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_the_sampler_converges_to_the_data_whatever_the_target(predict, variance):
    data = Gaussian()
    B = 5_000
    model = oracle(data, predict, clip=False, variance=variance)
    x = last(model.sample(torch.randn(B, 1, 1, 1).double(), steps="100"))
    within(x.mean(), data.mu, data.s / math.sqrt(B), what="the samples' mean")
    within(x.std(), data.s, data.s / math.sqrt(2 * B), what="their spread", slack=0.01)


@pytest.mark.function("pdm", "PDM.x_from_target")
@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_ddim_converges_to_the_exact_ode_whatever_the_target(predict):
    data = Gaussian()
    noise = torch.randn(5_000, 1, 1, 1).double()
    x = last(oracle(data, predict, clip=False).sample(noise, steps="100", eta=0.0))
    exact = data.along_the_ode(noise / (1 - ab[1000]).sqrt(), level(ab[1000]))
    error = (x - exact).abs().max()
    holds(error < 0.1, "after 100 steps no sample is off by 0.1", error=error)


# Split networks

def parts(split_snr=(0.25,), **options):
    """(model whose part k says 10 k + label everywhere, [the t that each part has seen])."""
    seen = []

    def make_net(c_in, c_out):
        k = len(seen)
        seen.append([])

        def fn(x, t, y):
            seen[k].extend(t.flatten().long().tolist())
            label = 0 if y is None else y.view(-1, 1, 1, 1)
            return torch.full_like(x, 10.0 * k) + label

        return closed_form(fn)(c_in, c_out)

    return PDM(make_net, 1, patch=1, split_snr=split_snr, **options), seen


def part_of(t, cuts):
    """The part that step t belongs to, for increasing cuts."""
    snr = ab[t] / (1 - ab[t])
    return sum((snr > cut).item() for cut in cuts)


@pytest.mark.equation("pdm", "Sec. 4.1")
@pytest.mark.function("pdm", "parts_of_steps", "Split.forward")
@pytest.mark.parametrize("cuts", [
    (0.25,),
    (4.0, 0.25),
    ((ab[300] / (1 - ab[300])).item(),),
], ids=["0.25", "4 and 0.25", "at a step"])
def test_a_cut_in_snr_belongs_to_the_noisier_part(cuts):
    model, seen = parts(cuts)
    model.loss(torch.zeros(20_000, 1, 1, 1).double())
    equal(len(seen), len(cuts) + 1, what="how many networks there are")
    for k, steps in enumerate(seen):
        expected = [t for t in range(1, 1001) if part_of(t, sorted(cuts)) == k]
        equal(sorted(set(steps)), expected, what=f"the steps that part {k} sees")
        share = 20 * len(expected)  # uniform over the chain
        error = math.sqrt(20 * len(expected))
        within(len(steps), share, error, what=f"how often part {k} is trained")


@pytest.mark.equation("pdm", "Sec. 4.1")
@pytest.mark.function("pdm", "Split.forward")
@pytest.mark.parametrize("sampler, evaluations", [
    ("ancestral", 50), ("ddim", 50), ("heun", 79), ("bound", 50),
])
def test_every_sampler_switches_network_at_the_cut(sampler, evaluations):
    model, seen = parts((0.25, 1.0), clip=False)
    noise = torch.zeros(2, 1, 1, 1).double()
    if sampler == "ancestral":
        last(model.sample(noise, steps="50"))
    elif sampler == "ddim":
        last(model.sample(noise, steps="50", eta=0.0))
    elif sampler == "heun":
        last(ode_sample(denoiser(model), noise, steps=40))
    else:
        model.bits_per_dim(noise, steps=50)
    equal(sum(len(steps) for steps in seen), 2 * evaluations, what="evaluations of 2 images")
    for k, steps in enumerate(seen):
        holds(steps, f"part {k} is evaluated", evaluations=0)
        by_others = [t for t in steps if part_of(t, (0.25, 1.0)) != k]
        equal(by_others, [], what=f"the steps of other parts that part {k} sees")


@pytest.mark.equation("pdm", "Sec. 4.1")
@pytest.mark.function("pdm", "Split.forward")
def test_images_of_both_parts_in_one_batch_get_their_own_network_and_class():
    model, _ = parts()
    t = torch.tensor([1000, 1, 999, 2]).view(4, 1, 1, 1)
    x_0_hat, _ = model.x_0_and_v(torch.zeros(4, 1, 2, 2).double(), t, torch.arange(4))
    close(x_0_hat[:, 0, 0, 0], [0 + 0, 10 + 1, 0 + 2, 10 + 3], what="10 part + label")


def one_network_and_its_copies():
    """A PDM of one network, and one of two parts that both are that network."""

    def make_net(c_in, c_out):
        return UNet(c_in, c_out, width=8, mults=(1, 1), classes=3)

    torch.manual_seed(3)
    one = PDM(make_net, 1, patch=2, learn_variance=True)
    for weights in one.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    two = PDM(make_net, 1, patch=2, learn_variance=True, split_snr=(0.25,))
    for net in two.net.nets:
        net.load_state_dict(one.net.state_dict())
    return one, two


@pytest.mark.function("pdm", "Split.forward")
def test_a_split_model_with_equal_parts_trains_as_one_network():
    one, two = one_network_and_its_copies()
    x = torch.rand(16, 1, 8, 8)
    losses = []
    for model in (one, two):
        torch.manual_seed(4)
        losses.append(model.loss(x, torch.arange(16) % 3))
        losses[-1].backward()
    close(losses[0], losses[1], rtol=1e-5, what="the loss")
    for name, weights in one.net.named_parameters():
        of_parts = sum(net.get_parameter(name).grad for net in two.net.nets)
        most = 1e-4 * (1 + weights.grad.abs().max().item())
        close(of_parts, weights.grad, rtol=0, atol=most, what=f"the parts' gradients of {name}")


@pytest.mark.function("pdm", "Split.forward")
def test_a_split_model_with_equal_parts_samples_as_one_network():
    x = torch.rand(16, 1, 8, 8)
    y = torch.arange(16) % 3
    samples = []
    for model in one_network_and_its_copies():
        model.net = Guided(model.net, 1.5)
        samples.append(last(model.sample(x, y, steps="10", randn_like=torch.ones_like)))
    equal(samples[1], samples[0])


@pytest.mark.function("pdm", "PDM.__init__", "patch_of_each_part")
def test_parts_may_have_patches_of_their_own_the_noisy_part_first():
    asked = []

    def make_net(c_in, c_out):
        asked.append(c_in)
        return torch.nn.Conv2d(c_in, c_out, 1)

    model = PDM(make_net, 3, patch=(4, 1), split_snr=(0.25,))
    equal(asked, [48, 3], what="each network's channels")
    equal([net.P for net in model.net.nets], [4, 1], what="each network's P")


@pytest.mark.function("pdm", "PDM.__init__", "patch_of_each_part", "parts_of_steps")
@pytest.mark.parametrize("options", [
    {"split_snr": (1e9,)},
    {"split_snr": (0.25, 0.25)},
    {"patch": (4, 1)},
    {"patch": (4, 2, 1), "split_snr": (0.25,)},
    {"patch": (4, 0), "split_snr": (0.25,)},
])
def test_parts_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="split_snr"):
        PDM(same_net, 1, **options)


# Optimal prediction

@pytest.mark.equation("pdm", "Optimal prediction")
@pytest.mark.function("pdm", "posterior_mean")
@pytest.mark.parametrize("alpha", [0.999, 0.5, 0.01])
def test_the_posterior_mean_is_the_data_weighted_by_how_well_they_explain_x_t(alpha):
    data = torch.randn(2300, 2, 2, 2).double()
    x_t = torch.randn(5, 2, 2, 2).double()
    away = x_t[:, None] - math.sqrt(alpha) * data
    distance = away.square().flatten(2).sum(2)
    weight = (-distance / (2 * (1 - alpha))).softmax(dim=1)
    expected = torch.einsum("bn,nchw->bchw", weight, data)
    close(posterior_mean(x_t, alpha, data), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("pdm", "Optimal prediction")
@pytest.mark.function("pdm", "posterior_mean")
def test_each_image_s_posterior_mean_may_have_its_own_noise():
    data = torch.randn(2300, 2, 2, 2).double()
    x_t = torch.randn(5, 2, 2, 2).double()
    alphas = images(0.5, 0.1, 0.9, 0.3, 0.7)
    together = posterior_mean(x_t, alphas, data)
    for k, alpha in enumerate(alphas.flatten().tolist()):
        alone = posterior_mean(x_t[k:k + 1], alpha, data)
        close(together[k:k + 1], alone, rtol=1e-6, what=f"image {k} at alpha_t {alpha}")


@pytest.mark.equation("pdm", "Optimal prediction")
@pytest.mark.function("pdm", "posterior_mean")
@pytest.mark.parametrize("alpha", [1, 1 - 1e-9, 1e-12])
def test_the_posterior_mean_is_stable_from_no_noise_to_nothing_but_noise(alpha):
    data = 2 * torch.rand(1500, 3, 16, 16) - 1
    noise = torch.randn(4, 3, 16, 16)
    x_t = math.sqrt(alpha) * data[:4] + math.sqrt(1 - alpha) * noise
    expected = data[:4]
    if alpha < 0.5:
        expected = data.mean(0).expand(4, -1, -1, -1)
    x = posterior_mean(x_t, alpha, data)
    equal(x.dtype, torch.float32)
    close(x, expected, rtol=0, atol=1e-3)


@pytest.mark.equation("pdm", "Optimal prediction")
@pytest.mark.function("pdm", "posterior_mean")
def test_the_posterior_mean_between_two_equally_near_images_is_halfway():
    data = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    x = posterior_mean(torch.zeros(1, 1, 2, 2), 1 - 1e-6, data)
    close(x, torch.zeros(1, 1, 2, 2), atol=1e-6)


@pytest.mark.equation("pdm", "Optimal prediction")
@pytest.mark.function("pdm", "posterior_mean")
def test_the_posterior_mean_of_many_gaussian_images_is_that_of_the_gaussian():
    data = Gaussian()
    x_t = torch.linspace(-1, 1, 7).view(-1, 1, 1, 1).double()
    alpha = tensor(0.4)
    x = posterior_mean(x_t, alpha, data.draw(200_000))
    close(x, data.x_0(x_t, alpha), rtol=0, atol=0.02)
