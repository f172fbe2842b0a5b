import math

import pytest
import torch
from conftest import Gaussian, close, closed_form, cosine_alpha_bar, last, tensor

from ddpm import linear_betas
from edm import denoiser, ode_sample
from pdm import PDM, patchify, posterior_mean, unpatchify
from unet import Guided, UNet

ab = cosine_alpha_bar()
WEIGHTS = ("1", "sqrt_snr", "snr", "snr+1", "truncated", "p2")


def oracle(data, predict="x", factor=1.0, **kw):
    """PDM at P = 1 whose network outputs the exact target for this data, times `factor` in x."""
    def fn(z, t, y):
        a = ab[t.long()]
        x = factor * data.x_0(z, a)
        eps = (z - a.sqrt() * x) / (1 - a).sqrt()
        return {"x": x, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x}[predict]
    return PDM(closed_form(fn), 1, patch=1, predict=predict, **kw)


# Patch round-trips

@pytest.mark.parametrize("P, H, W", [(1, 5, 7), (2, 8, 8), (4, 8, 16), (8, 16, 8), (3, 9, 12), (5, 10, 10)])
def test_the_patch_round_trip_is_exact(P, H, W):
    x = torch.randn(2, 3, H, W)
    assert patchify(x, P).shape == (2, 3 * P * P, H // P, W // P)
    assert torch.equal(unpatchify(patchify(x, P), P), x)


def test_a_patch_is_the_p_by_p_block_of_pixels_under_its_grid_cell():
    x = torch.randn(1, 3, 8, 12)
    for i in range(2):
        for j in range(3):
            block = x[0, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
            assert torch.equal(patchify(x, 4)[0, :, i, j].sort()[0], block.flatten().sort()[0])


def test_the_network_sees_c_p_squared_channels_on_a_grid_p_times_coarser():
    asked, seen = [], []
    class Net(torch.nn.Module):
        def forward(self, x, t, y=None):
            seen.append(x.shape)
            return torch.cat([x, x], dim=1)
    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return Net()
    PDM(make_net, 3, patch=4, learn_variance=True).loss(torch.randn(2, 3, 32, 16))
    assert asked == [(48, 96)] and seen == [(2, 48, 8, 4)]


@pytest.mark.parametrize("P", [1, 2, 3, 8])
def test_the_network_is_asked_for_p_squared_times_the_channels(P):
    asked = []
    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return torch.nn.Identity()
    PDM(make_net, 3, patch=P)
    PDM(make_net, 3, patch=P, learn_variance=True)
    assert asked == [(3 * P ** 2, 3 * P ** 2), (3 * P ** 2, 6 * P ** 2)]


def test_a_checkpoint_holds_what_was_learned_and_nothing_else():
    net = lambda c_in, c_out: torch.nn.Conv2d(c_in, c_out, 1, bias=False)
    assert [w.shape for w in PDM(net, 3).state_dict().values()] == [(48, 48, 1, 1)] and PDM(net, 3).clip
    assert [w.shape for w in PDM(net, 3, split_snr=(0.25,)).state_dict().values()] == [(48, 48, 1, 1)] * 2


def test_mean_and_variance_unfold_separately():
    model = PDM(closed_form(lambda x, t, y: torch.cat([x, torch.full_like(x, 0.5)], dim=1)), 3, patch=4, learn_variance=True)
    x_0_hat, v = model.x_0_and_v(torch.randn(2, 3, 8, 8), 500)
    assert x_0_hat.shape == v.shape == (2, 3, 8, 8) and (v == 0.5).all() and (x_0_hat != 0.5).all()


def test_with_p_1_eps_and_weight_snr_it_is_iddpm_s_l_simple():
    seen, x_0 = [], torch.randn(64, 1, 4, 4).double()
    net = closed_form(lambda x, t, y: seen.append((x, t.long())) or 0.3 * x)
    loss = PDM(net, 1, patch=1, predict="eps", weight="snr", T=100).loss(x_0)
    (x_t, t), = seen
    a = cosine_alpha_bar(100)[t]
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()                                        # the noise that was drawn, whenever it was
    close(loss, (eps - 0.3 * x_t).square().mean(), rtol=1e-6)


# Targets and weights

@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_every_target_leads_back_to_the_same_x(predict):
    data = Gaussian()
    x_t = torch.randn(8, 1, 1, 1).double()
    for t in (1, 100, 500, 900):
        close(oracle(data, predict).predict(x_t, t), data.x_0(x_t, ab[t]), rtol=1e-6)


@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_a_target_is_what_the_network_must_say_for_x_to_come_back(predict):
    x, eps, model = torch.randn(4, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double(), oracle(Gaussian(), predict)
    for t in (1, 500, 1000):
        target = model.training_target(x, eps, t)
        close(target, {"x": x, "eps": eps, "v": ab[t].sqrt() * eps - (1 - ab[t]).sqrt() * x}[predict], rtol=1e-12)
        close(model.x_from_target(model.q_sample(x, t, eps), t, target), x, rtol=1e-6, atol=1e-9)


def expected_loss(data, weight, factor):  # E_t gamma_t E (x - factor E[x | z])^2, by summing over t
    a = ab[1:]
    snr = a / (1 - a)
    gamma = {"1": torch.ones_like(snr), "sqrt_snr": snr.sqrt(), "snr": snr, "snr+1": snr + 1,
             "truncated": torch.where(snr > 1, snr, 1.0), "p2": snr * (1 - a).sqrt()}[weight]
    unexplained = data.s ** 2 * (1 - a) / (a * data.s ** 2 + 1 - a)
    explained = data.s ** 2 - unexplained
    error = unexplained + (1 - factor) ** 2 * (explained + data.mu ** 2)
    return gamma * error


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_is_the_weighted_error_in_x(weight):
    data = Gaussian()
    model, expected = oracle(data, factor=0.9, weight=weight), expected_loss(data, weight, 0.9).mean()
    losses = torch.stack([model.loss(data.draw(5_000)) for _ in range(40)])
    assert abs(losses.mean() - expected) < 5 * losses.std() / math.sqrt(40)
    assert losses.std() / math.sqrt(40) < 0.03 * expected


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_weight_of_each_step_is_this_function_of_its_snr(weight):
    t = torch.tensor([1, 200, 500, 800, 1000])
    gamma = PDM(closed_form(lambda x, t, y: x), 1, patch=1, weight=weight).gamma(t)
    a = ab[t]
    close(gamma, {"1": 1 + 0 * a, "sqrt_snr": (a / (1 - a)) ** 0.5, "snr": a / (1 - a), "snr+1": 1 / (1 - a),
                  "truncated": torch.maximum(a / (1 - a), 1 + 0 * a), "p2": a / (1 - a) ** 0.5}[weight], rtol=1e-7)


def test_a_learned_variance_adds_lambda_l_vlb_and_leaves_the_mean_alone():
    seen, x_0, net = [], torch.full((8, 1, 2, 2), 0.1).double(), torch.nn.Module()
    net.out = torch.nn.Parameter(torch.randn(8, 2, 2, 2).double())
    net.forward = lambda x, t, y=None: seen.append((x, t.long().view(-1, 1, 1, 1))) or net.out
    model = PDM(lambda i, o: net, 1, patch=1, learn_variance=True)
    loss = model.loss(x_0)
    loss.backward()
    (x_t, t), = seen
    snr = ab[t] / (1 - ab[t])
    x_hat, v = net.out.detach().chunk(2, dim=1)
    close(loss.detach(), (snr.sqrt() * (x_0 - x_hat) ** 2).mean() + 0.001 * 1000 * model.L_t(x_0, x_t, t, x_hat, v).mean(), rtol=1e-6)
    close(net.out.grad[:, :1], 2 * snr.sqrt() * (x_hat - x_0) / x_0.numel(), rtol=1e-6)
    assert (net.out.grad[:, 1:] != 0).all()


def test_linear0_025_ends_its_betas_at_0_025():
    alpha_bar = PDM(closed_form(lambda x, t, y: x), 1, patch=1, schedule="linear0.025").alpha_bar
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    close(betas[[0, -1]], [1e-4, 0.025], rtol=1e-7)
    close(PDM(closed_form(lambda x, t, y: x), 1, patch=1, schedule="linear").alpha_bar[1:], (1 - linear_betas(1000)).cumprod(0))


# Sampler convergence on Gaussian data

@pytest.mark.parametrize("predict", ["x", "eps", "v"])
def test_the_sampler_converges_to_the_data_whatever_the_target(predict):
    data = Gaussian()
    noise = torch.randn(5_000, 1, 1, 1).double()
    for options in (dict(variance="large"), dict(variance="small")):
        x = last(oracle(data, predict, clip=False, **options).sample(noise, steps="100"))
        assert abs(x.mean() - data.mu) < 5 * data.s / math.sqrt(5_000)
        assert abs(x.std() - data.s) < 5 * data.s / math.sqrt(2 * 5_000) + 0.01
    x = last(oracle(data, predict, clip=False).sample(noise, steps="100", eta=0.0))
    exact = data.mu + (noise / ab[1000].sqrt() - data.mu) * data.s / (data.s ** 2 + (1 - ab[1000]) / ab[1000]).sqrt()
    assert (x - exact).abs().max() < 0.1


def test_a_patch_of_zero_is_refused():
    with pytest.raises(ValueError, match="patch"):
        PDM(closed_form(lambda x, t, y: x), 1, patch=0)


# Split networks

def parts(split_snr=(0.25,), **kw):  # each part's network says which it is, and keeps the t that it saw
    seen, nets = [], []

    def make_net(c_in, c_out):
        k = len(seen)
        seen.append([])
        nets.append(closed_form(lambda x, t, y: seen[k].extend(t.flatten().tolist()) or torch.full_like(x, 10.0 * k) + (0 if y is None else y.view(-1, 1, 1, 1)))(0, 0))
        return nets[-1]
    kw = dict(patch=1) | kw
    return PDM(make_net, 1, split_snr=split_snr, **kw), seen


def test_a_cut_in_snr_belongs_to_the_noisier_part_and_each_part_sees_its_own_steps_only():
    alpha_bar = parts()[0].alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)
    for cuts in ((0.25,), (4.0, 0.25), (snr[299].item(),)):
        model, seen = parts(cuts)
        model.loss(torch.zeros(20_000, 1, 1, 1).double())
        cuts = sorted(cuts)
        for k, steps in enumerate(seen):
            own = [t for t in range(1, 1001) if (k == 0 or snr[t - 1] > cuts[k - 1]) and (k == len(cuts) or snr[t - 1] <= cuts[k])]
            assert set(steps) == set(own) and len(seen) == len(cuts) + 1
            counts = torch.tensor(steps).long().bincount(minlength=1001)[own].double()
            assert abs(counts.mean() - 20) < 5 * math.sqrt(20 / len(own))                                # uniform over the chain


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "heun", "bound"])
def test_every_sampler_switches_network_at_the_cut(sampler):
    model, seen = parts((0.25, 1.0), clip=False)
    noise = torch.zeros(2, 1, 1, 1).double()
    if sampler == "heun":
        last(ode_sample(denoiser(model), noise, steps=40))
    elif sampler == "bound":
        model.bits_per_dim(noise, steps=50)
    else:
        last(model.sample(noise, steps="50", eta=None if sampler == "ancestral" else 0.0))
    snr = ab / (1 - ab).clamp(min=1e-12)
    assert all(seen) and sum(map(len, seen)) == 2 * (79 if sampler == "heun" else 50)
    assert all(snr[int(t)] <= 0.25 for t in seen[0]) and all(0.25 < snr[int(t)] <= 1 for t in seen[1]) and all(snr[int(t)] > 1 for t in seen[2])


def test_images_of_both_parts_in_one_batch_get_their_own_network_and_class():
    model, _ = parts()
    t = torch.tensor([1000, 1, 999, 2]).view(4, 1, 1, 1)
    x_0_hat, _ = model.x_0_and_v(torch.zeros(4, 1, 2, 2).double(), t, torch.arange(4))
    close(x_0_hat[:, 0, 0, 0], [0 + 0, 10 + 1, 0 + 2, 10 + 3])


def test_a_split_model_with_equal_parts_is_one_network():
    torch.manual_seed(3)
    one = PDM(lambda i, o: UNet(i, o, width=8, mults=(1, 1), classes=3), 1, patch=2, learn_variance=True)
    for w in one.parameters():
        torch.nn.init.normal_(w, std=0.2)
    two = PDM(lambda i, o: UNet(i, o, width=8, mults=(1, 1), classes=3), 1, patch=2, learn_variance=True, split_snr=(0.25,))
    for net in two.net.nets:
        net.load_state_dict(one.net.state_dict())
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    losses = []
    for model in (one, two):
        torch.manual_seed(4)
        losses.append(model.loss(x, y))
        losses[-1].backward()
    close(losses[0].detach(), losses[1].detach(), rtol=1e-5)
    both = [sum(net.get_parameter(name).grad for net in two.net.nets) for name, _ in one.net.named_parameters()]
    assert all((a.grad - b).abs().max() < 1e-4 * (1 + a.grad.abs().max()) for a, b in zip(one.net.parameters(), both))
    a, b = (last(Guiding(model).sample(x, y, steps="10", randn_like=torch.ones_like)) for model in (one, two))
    assert torch.equal(a, b)


def Guiding(model):
    model.net = Guided(model.net, 1.5)
    return model


def test_parts_may_have_patches_of_their_own_the_noisy_part_first():
    asked = []
    model = PDM(lambda c_in, c_out: asked.append(c_in) or torch.nn.Conv2d(c_in, c_out, 1), 3, patch=(4, 1), split_snr=(0.25,))
    assert asked == [48, 3] and [net.P for net in model.net.nets] == [4, 1]


@pytest.mark.parametrize("kw", [
    dict(split_snr=(1e9,)), dict(split_snr=(0.25, 0.25)), dict(patch=(4, 1)),
    dict(patch=(4, 2, 1), split_snr=(0.25,)), dict(patch=(4, 0), split_snr=(0.25,))])
def test_parts_that_cannot_be_are_refused(kw):
    with pytest.raises(ValueError, match="split_snr"):
        PDM(closed_form(lambda x, t, y: x), 1, **kw)


# Optimal prediction

def test_guidance_is_1_5_by_default():
    assert PDM.guidance == 1.5


def test_the_posterior_mean_is_the_data_weighted_by_how_well_they_explain_x_t():
    data, x_t = torch.randn(2300, 2, 2, 2).double(), torch.randn(5, 2, 2, 2).double()
    for a in (0.999, 0.5, 0.01):
        logits = torch.stack([-(z - math.sqrt(a) * data).square().flatten(1).sum(1) / (2 * (1 - a)) for z in x_t])
        weight = (logits - logits.max(dim=1, keepdim=True)[0]).exp()
        exact = torch.einsum("bn,nchw->bchw", weight / weight.sum(1, keepdim=True), data)
        close(posterior_mean(x_t, a, data), exact, rtol=1e-6, atol=1e-9)
    some = tensor([0.5, 0.1, 0.9, 0.3, 0.7]).view(5, 1, 1, 1)
    close(posterior_mean(x_t, some, data)[2], posterior_mean(x_t[2:3], 0.9, data)[0], rtol=1e-6)


def test_the_posterior_mean_is_stable_from_almost_no_noise_to_nothing_but_noise():
    data = 2 * torch.rand(1500, 3, 16, 16) - 1
    for a, expected in ((1, data[:4]), (1 - 1e-9, data[:4]), (1e-12, data.mean(0).expand(4, -1, -1, -1))):
        x = posterior_mean(math.sqrt(a) * data[:4] + math.sqrt(1 - a) * torch.randn(4, 3, 16, 16), a, data)
        assert x.dtype == torch.float32 and (x - expected).abs().max() < 1e-3
    equal = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    assert posterior_mean(torch.zeros(1, 1, 2, 2), 1 - 1e-6, equal).abs().max() < 1e-6            # a tie


def test_the_posterior_mean_of_many_gaussian_images_is_that_of_the_gaussian():
    data = Gaussian()
    x_t, a = torch.linspace(-1, 1, 7).view(-1, 1, 1, 1).double(), tensor(0.4)
    close(posterior_mean(x_t, a, data.draw(200_000)), data.x_0(x_t, a), rtol=0, atol=0.02)
