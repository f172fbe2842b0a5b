import math

import pytest
import torch
from explain import close, equal, holds, mean_within, within
from helpers import (
    Gaussian,
    asks_and_teaches,
    closed_form,
    cosine_alpha_bar,
    golden,
    halves,
    images,
    last,
    linear_alpha_bar,
    same_net,
    states,
    tanh_cdf,
    tape,
    tensor,
    watched,
    zero_net,
)
from torch.utils._python_dispatch import TorchDispatchMode

from iddpm import IDDPM, LossAwareSampler, cosine_betas, space_timesteps


def constants(eps, v):
    """A network that says this eps and this v everywhere."""
    return halves(lambda x, t: torch.full_like(x, eps), lambda x, t: torch.full_like(x, v))


def bits(nats):
    return nats / math.log(2)


# Schedule

@pytest.mark.equation("iddpm", "Eq. 17", "Sec. 3.2")
@pytest.mark.function("iddpm", "cosine_betas")
@pytest.mark.parametrize("T", [100, 1000, 4000])
def test_cosine_betas_are_the_authors(T):
    table = golden("schedules")["outputs"][f"cosine_{T}"]
    betas = cosine_betas(T)
    close(betas[table["index"]], table["betas"])
    close(betas.sum(), table["betas_sum"], what="the sum of the betas")
    clipped = (betas == 0.999).sum().item()
    equal(clipped, table["num_betas_clipped_at_0.999"], what="how many betas are 0.999")


@pytest.mark.function("iddpm", "IDDPM.__init__")
@pytest.mark.parametrize("schedule, expected", [
    ("cosine", cosine_alpha_bar()),
    ("linear", linear_alpha_bar()),
], ids=["cosine", "linear"])
def test_both_schedules_fall_from_one(schedule, expected):
    alpha_bar = IDDPM(constants(0, 0), 1, schedule=schedule).alpha_bar
    close(alpha_bar, expected)
    equal(alpha_bar[0].item(), 1.0)
    rise = alpha_bar.diff().max()
    holds(rise < 0, "alpha_bar falls at every step", largest_change=rise)
    holds(alpha_bar[-1] > 0, "alpha_bar_T is above 0", came=alpha_bar[-1])


@pytest.mark.equation("iddpm", "Sec. 3.2")
@pytest.mark.function("iddpm", "cosine_betas")
def test_the_cosine_schedule_destroys_the_image_later_than_the_linear_one():
    cosine = (1 - cosine_betas(1000)).cumprod(0)
    lead = (cosine[100:950] - linear_alpha_bar()[101:951]).min()
    holds(lead > 0, "the cosine's alpha_bar is the larger at t = 101..950", smallest_lead=lead)


# Learned variance

@pytest.mark.equation("iddpm", "Eq. 15")
@pytest.mark.function("iddpm", "IDDPM.log_variance")
@pytest.mark.parametrize("v", [-1, 0, 1])
def test_v_runs_from_log_beta_tilde_at_minus_one_to_log_beta_at_one(v):
    table = golden("schedules")["outputs"]["cosine_1000"]
    t = torch.tensor(table["index"]).view(-1, 1, 1, 1) + 1
    x = torch.zeros(t.shape, dtype=torch.float64)
    log_beta_tilde = tensor(table["posterior_log_variance_clipped"])
    log_beta = tensor(table["betas"]).log()
    expected = {-1: log_beta_tilde, 0: (log_beta_tilde + log_beta) / 2, 1: log_beta}[v]
    _, log_variance, _ = IDDPM(constants(0, v), 1).p_mean_variance(x, t, t - 1)
    close(log_variance.flatten(), expected, what="log Sigma_theta")


@pytest.mark.function("iddpm", "IDDPM.__init__")
@pytest.mark.parametrize("objective, expected", [("hybrid", 6), ("vlb", 6), ("simple", 3)])
def test_a_learned_v_takes_as_many_channels_again(objective, expected):
    asked = []

    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return torch.nn.Identity()

    IDDPM(make_net, 3, objective=objective)
    equal(asked, [(3, expected)], what="the network's channels in and out")


@pytest.mark.function("iddpm", "IDDPM.log_variance")
@pytest.mark.parametrize("variance", ["small", "large"])
def test_without_a_learned_variance_it_is_fixed_as_in_ddpm(variance):
    model = IDDPM(same_net, 1, objective="simple", variance=variance)
    _, log_variance, _ = model.p_mean_variance(images(0.0), 500, 499)
    ab = cosine_alpha_bar()
    beta = 1 - ab[500] / ab[499]
    beta_tilde = beta * (1 - ab[499]) / (1 - ab[500])
    expected = {"large": beta, "small": beta_tilde}[variance]
    close(log_variance, expected.log(), rtol=1e-7, what="log sigma_t^2")


@pytest.mark.equation("iddpm", "DDPM Eq. 11")
@pytest.mark.function("iddpm", "IDDPM.p_mean_variance")
@pytest.mark.parametrize("eps, edge", [(-50.0, 1.0), (50.0, -1.0)])
def test_x_0_hat_is_clipped_to_the_range_of_images_unless_told_otherwise(eps, edge):
    x = images(0.0)
    model = IDDPM(constants(eps, 0), 1)
    mean, _, x_0_hat = model.p_mean_variance(x, 500, 499)
    equal(x_0_hat, images(edge), what="x_0_hat")
    expected, _ = model.q_posterior(images(edge), x, 500)
    close(mean, expected, what="the mean of that x_0_hat")
    _, _, free = IDDPM(constants(eps, 0), 1, clip=False).p_mean_variance(x, 500, 499)
    holds(abs(free) > 10, "without clipping x_0_hat is far outside", x_0_hat=free)


# Objectives

def expected_terms(ab, x_0, v):
    """E[L_t], t = 1..T, bits/dim, of a network that says eps = 0 and this v, for pixels x_0."""
    beta = 1 - ab[1:] / ab[:-1]
    beta_tilde = beta[1:] * (1 - ab[1:-1]) / (1 - ab[2:])  # of t = 2..T
    beta_tilde = torch.cat([beta_tilde[:1], beta_tilde])
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()
    factor = ab[:-1].sqrt() * beta / (1 - ab[1:])  # of x_0_hat in the mean
    off = factor**2 * (1 - ab[1:]) / ab[1:]  # E (mean - posterior mean)^2
    ratio = beta_tilde.log() - log_variance
    terms = (-ratio - 1 + ratio.exp() + off * (-log_variance).exp()) / 2
    # At t = 1 the mean is x_0_hat = x_0 + eps sqrt((1 - ab) / ab)
    eps = torch.randn(400_000, dtype=torch.float64)
    x = -((1 - ab[1]) / ab[1]).sqrt() * eps  # x_0 - mean
    scale = (-log_variance[0] / 2).exp()
    inside = tanh_cdf((x + 1 / 255) * scale) - tanh_cdf((x - 1 / 255) * scale)
    terms[0] = -inside.clamp(min=1e-12).log().mean()
    return bits(terms)


def losses(model, n, times, x_0=0.1):
    """Losses of `times` batches of n one-pixel images."""
    batch = torch.full((n, 1, 1, 1), x_0).double()
    return torch.stack([model.loss(batch) for _ in range(times)])


@pytest.mark.equation("iddpm", "Eq. 16")
@pytest.mark.function("iddpm", "IDDPM.loss")
def test_l_hybrid_is_l_simple_plus_lambda_times_the_sum_of_the_terms():
    T = 8
    terms = expected_terms(cosine_alpha_bar(T), 0.1, 0.4)
    model = IDDPM(constants(0, 0.4), 1, T=T, lambda_vlb=0.3)
    mean_within(losses(model, 20_000, 30), 1 + 0.3 * terms.sum(), what="L_hybrid")


@pytest.mark.function("iddpm", "IDDPM.loss")
@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_the_loss_asks_for_each_image_s_class_and_teaches_the_network(objective):
    channels = 1 if objective == "simple" else 2
    asks_and_teaches(lambda net: IDDPM(net, 1, objective=objective), channels)


@pytest.mark.equation("iddpm", "DDPM Eq. 14")
@pytest.mark.function("iddpm", "IDDPM.loss")
def test_l_simple_of_a_network_that_predicts_nothing_is_one():
    model = IDDPM(zero_net, 1, T=8, objective="simple")
    loss = model.loss(torch.full((100_000, 1, 1, 1), 0.1))
    within(loss, 1, math.sqrt(2 / 100_000), what="L_simple")


@pytest.mark.equation("iddpm", "Eq. 4", "Eq. 5", "Eq. 6")
@pytest.mark.function("iddpm", "IDDPM.loss", "IDDPM.L_t")
def test_l_vlb_is_the_sum_of_the_terms_where_t_is_drawn_evenly():
    T = 8
    terms = expected_terms(cosine_alpha_bar(T), 0.1, 0.4)
    model = IDDPM(constants(0, 0.4), 1, T=T, objective="vlb", importance=False)
    equal(model.sampler, None)
    mean_within(losses(model, 1_000, 20), terms.sum(), what="L_vlb")


@pytest.mark.equation("iddpm", "Eq. 18")
@pytest.mark.function("iddpm", "IDDPM.draw_t", "IDDPM.loss", "LossAwareSampler.weights")
def test_l_vlb_is_the_sum_of_the_terms_where_t_is_drawn_by_importance():
    T = 8
    expected = expected_terms(cosine_alpha_bar(T), 0.1, 0.4).sum()
    model = IDDPM(constants(0, 0.4), 1, T=T, objective="vlb")
    first = losses(model, 5_000, 1)[0]
    off = abs(first - expected) / expected
    holds(off < 0.2, f"the first loss is off by a fifth of {expected:.3g} at most", loss=first)
    apart = (model.sampler.probabilities() - 1 / T).abs().max()
    holds(apart > 0.1, "by now some t are drawn more often than others", largest_lead=apart)
    weighted = losses(model, 1_000, 20)
    mean_within(weighted, expected, what="L_vlb")
    plain = IDDPM(constants(0, 0.4), 1, T=T, objective="vlb", importance=False)
    evenly = losses(plain, 1_000, 20)
    alike = "the losses are at most half as noisy as where t is drawn evenly"
    holds(evenly.std() > 2 * weighted.std(), alike, evenly=evenly.std(), by=weighted.std())


@pytest.mark.equation("iddpm", "Eq. 5", "Eq. 6")
@pytest.mark.function("iddpm", "IDDPM.L_t")
def test_the_terms_of_the_bound_are_the_authors():
    table = golden("vlb")
    inputs = table["inputs"]
    outputs = table["training_losses"]["linear|T=1000|RESCALED_MSE"]
    out = tensor(inputs["model_output_6ch"])
    noise = tensor(inputs["noise"])
    x_0 = tensor(inputs["pixels"]) / 127.5 - 1
    t = torch.tensor(inputs["t_index"]).view(-1, 1, 1, 1) + 1
    model = IDDPM(closed_form(lambda x, t, y: out), 3, schedule="linear")
    x_t = model.q_sample(x_0, t, noise)
    vb = model.L_t(x_0, x_t, t, model.predict(x_t, t), out[:, 3:])
    close(vb, outputs["vb"], rtol=1e-2, what="bits/dim of the terms")
    mse = (noise - out[:, :3]).square().flatten(1).mean(1)
    close(mse + 0.001 * 1000 * vb, outputs["loss"], rtol=1e-2, what="L_hybrid of each image")


@pytest.mark.equation("iddpm", "DDPM Eq. 14")
@pytest.mark.function("iddpm", "IDDPM.outputs")
@pytest.mark.parametrize("name", ["RESCALED_MSE", "L_simple"])
def test_the_mean_square_errors_are_the_authors(name):
    table = golden("vlb")
    inputs = table["inputs"]
    out = tensor(inputs["model_output_6ch"])
    noise = tensor(inputs["noise"])
    t = torch.tensor(inputs["t_index"]).view(-1, 1, 1, 1) + 1
    model = IDDPM(closed_form(lambda x, t, y: out), 3, schedule="linear")
    eps_hat, _ = model.outputs(noise, t)
    mse = (noise - eps_hat).square().flatten(1).mean(1)
    close(mse, table["training_losses"][f"linear|T=1000|{name}"]["mse"], rtol=1e-3)


@pytest.mark.equation("iddpm", "Eq. 16", "Eq. 4", "DDPM Eq. 14")
@pytest.mark.function("iddpm", "IDDPM.loss")
@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_the_loss_of_any_network_is_its_equation(objective):
    def fn(x, t, y):
        return 0.3 * x if objective == "simple" else torch.cat([0.3 * x, 0.1 * x], dim=1)

    x_0 = torch.rand(6, 2, 4, 4).double() * 2 - 1
    net, calls = watched(fn)
    model = IDDPM(net, 2, T=40, objective=objective, lambda_vlb=0.02)
    loss = model.loss(x_0)
    x_t = calls[0].x
    t = calls[0].t.long()
    ab = cosine_alpha_bar(40)[t]
    eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
    x_0_hat = (x_t - (1 - ab).sqrt() * 0.3 * x_t) / ab.sqrt()
    L_simple = (eps - 0.3 * x_t).square().mean()
    L_vlb = 40 * model.L_t(x_0, x_t, t, x_0_hat, 0.1 * x_t).mean()
    L_hybrid = L_simple + 0.02 * L_vlb
    expected = {"simple": L_simple, "hybrid": L_hybrid, "vlb": L_vlb}[objective]
    close(loss, expected, rtol=1e-6, what=f"L_{objective}")


@pytest.mark.equation("iddpm", "Eq. 16")
@pytest.mark.function("iddpm", "IDDPM.__init__")
def test_lambda_is_the_paper_s():
    equal(IDDPM(constants(0, 0), 1).lambda_vlb, 0.001)


class Free(torch.nn.Module):
    """A network whose output is its one parameter."""

    def __init__(self, out):
        super().__init__()
        self.out = torch.nn.Parameter(out.clone())

    def forward(self, x, t, y=None):
        return self.out


@pytest.mark.equation("iddpm", "Sec. 3.1")
@pytest.mark.function("iddpm", "IDDPM.loss")
def test_only_the_variance_learns_from_l_vlb_in_the_hybrid():
    out = torch.randn(8, 2, 2, 2).double()

    def gradient(objective):
        net = Free(out[:, :1] if objective == "simple" else out)
        torch.manual_seed(1)
        model = IDDPM(lambda c_in, c_out: net, 1, objective=objective)
        model.loss(torch.zeros(8, 1, 2, 2).double()).backward()
        return net.out.grad

    of_eps, of_v = gradient("hybrid").chunk(2, dim=1)
    close(of_eps, gradient("simple"), rtol=1e-7, what="the gradient of eps, as of L_simple")
    holds((of_v != 0).all(), "v has a gradient everywhere", gradient=of_v)
    of_both = gradient("vlb")
    holds((of_both != 0).all(), "L_vlb has a gradient everywhere", gradient=of_both)


# Importance sampling

@pytest.mark.equation("iddpm", "Sec. 3.3")
@pytest.mark.function("iddpm", "LossAwareSampler.probabilities", "LossAwareSampler.update")
def test_importance_sampling_is_uniform_until_every_t_has_ten_losses():
    sampler = LossAwareSampler(4)
    for _ in range(10):
        sampler.update(torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]))
    sampler.update(torch.full((9,), 4), torch.full((9,), 5.0))
    close(sampler.probabilities(), torch.full((4,), 0.25), what="p_t, t = 4 seen 9 times")
    sampler.update(torch.tensor([4]), torch.tensor([5.0]))
    p = sampler.probabilities()
    holds(p[3] > 0.4, "at its tenth loss t = 4 is drawn most", probabilities=p)


def by_size(size):
    """Eq. 18 with the share that the authors spread evenly."""
    return 0.999 * size / size.sum() + 0.001 / len(size)


@pytest.mark.function("iddpm", "IDDPM.__init__")
def test_latents_are_not_clipped_and_have_no_bound():
    equal(IDDPM.latent_config, {"clip": False, "objective": "simple"})


@pytest.mark.equation("iddpm", "Eq. 18")
@pytest.mark.function("iddpm", "LossAwareSampler.probabilities", "LossAwareSampler.update")
def test_p_t_follows_the_root_mean_square_of_the_last_ten_losses():
    sampler = LossAwareSampler(2)
    for loss in [100.0] * 20 + list(range(1, 11)):
        sampler.update(torch.tensor([1, 2]).view(2, 1, 1, 1), torch.tensor([loss, 3.0]))
    root_mean_square = tensor([math.sqrt(38.5), 3.0])  # of 1 to 10
    close(sampler.probabilities(), by_size(root_mean_square), rtol=1e-5, what="p_t")


@pytest.mark.equation("iddpm", "Eq. 18")
@pytest.mark.function("iddpm", "LossAwareSampler.update")
def test_the_last_ten_losses_count_however_often_a_step_comes_in_a_batch():
    sampler = LossAwareSampler(2)
    seen = 0
    for size in (3, 1, 4, 2, 1, 3, 5, 1, 1, 4, 3):
        sampler.update(torch.ones(size).long(), torch.arange(seen, seen + size) ** 2.0)
        sampler.update(torch.tensor([2]), torch.tensor([300.0]))
        seen += size
    last_ten = torch.arange(seen - 10, seen).double() ** 2
    root_mean_square = torch.stack([last_ten.square().mean().sqrt(), tensor(300.0)])
    close(sampler.probabilities(), by_size(root_mean_square), rtol=1e-5, what="p_t")


class Backwards(TorchDispatchMode):
    """Values for several places are written from the last to the first, as a GPU may."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_put_.default:
            x, indices, values, *rest = args
            args = (x, [i.flip(0) for i in indices], values.flip(0), *rest)
        return func(*args, **(kwargs or {}))


@pytest.mark.function("iddpm", "LossAwareSampler.update")
def test_the_last_ten_losses_count_in_whatever_order_a_gpu_writes_them():
    t = torch.tensor([1, 1, 2]).repeat(9)
    loss = torch.arange(27.0)
    sampler = LossAwareSampler(2)
    sampler.update(t[:4], loss[:4])
    with Backwards():
        sampler.update(t, loss)
    equal(sampler.losses[0].sort().values, loss[t == 1][-10:], what="the losses kept of t = 1")
    equal(sampler.losses[1].sort().values, torch.cat([loss[2:3], loss[t == 2]]))


@pytest.mark.function("iddpm", "LossAwareSampler.update", "of_all_processes")
def test_the_losses_of_every_process_count(monkeypatch):
    def two_processes(parts, x):
        parts[0].copy_(x)
        parts[1].copy_(x + 1)

    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True, raising=False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2, raising=False)
    monkeypatch.setattr(torch.distributed, "all_gather", two_processes, raising=False)
    sampler = LossAwareSampler(2)
    for _ in range(10):
        sampler.update(torch.tensor([1]), torch.tensor([2.0]))
    close(sampler.probabilities(), by_size(tensor([2.0, 3.0])), rtol=1e-5, what="p_t")


@pytest.mark.equation("iddpm", "Eq. 18")
@pytest.mark.function("iddpm", "IDDPM.loss")
def test_importance_sampling_learns_from_the_losses_before_they_are_weighted():
    T = 8
    terms = expected_terms(cosine_alpha_bar(T), 0.1, 0.4)
    model = IDDPM(constants(0, 0.4), 1, T=T, objective="vlb")
    for _ in range(30):
        model.loss(torch.full((64, 1, 32, 32), 0.1).double().requires_grad_())
    kept = "what is kept holds on to no gradient, or each step would to all before it"
    holds(not model.sampler.losses.requires_grad, kept)
    close(model.sampler.probabilities(), by_size(terms), rtol=0.15, what="p_t")


# Fewer steps

@pytest.mark.function("iddpm", "space_timesteps")
@pytest.mark.parametrize("key", list(golden("respacing")["timesteps"]))
def test_the_kept_steps_are_the_authors(key):
    T, spec = key.split("|")
    expected = [t + 1 for t in golden("respacing")["timesteps"][key]]
    equal(space_timesteps(int(T), spec), expected)


@pytest.mark.function("iddpm", "space_timesteps")
@pytest.mark.parametrize("T, spec, expected", [
    (10, 2, [1, 10]),
    (10, "2,2", [1, 5, 6, 10]),
    (10, "1,1", [1, 6]),
    (3, "ddim2", [1, 3]),
    (5, "ddim5", [1, 2, 3, 4, 5]),
])
def test_both_ends_of_a_section_are_kept_and_a_stride_may_end_on_T(T, spec, expected):
    equal(space_timesteps(T, spec), expected)


@pytest.mark.function("iddpm", "space_timesteps")
@pytest.mark.parametrize("spec", ["ddim51", "1001", "0", "600,600", "many", "5,,5", "-3"])
def test_a_stride_or_section_that_cannot_be_is_refused(spec):
    with pytest.raises(ValueError):
        space_timesteps(1000, spec)


@pytest.mark.function("iddpm", "space_timesteps")
def test_a_number_of_steps_may_be_a_word():
    equal(space_timesteps(1000, 50), space_timesteps(1000, "50"))


@pytest.mark.equation("iddpm", "App. E")
@pytest.mark.function("iddpm", "space_timesteps")
@pytest.mark.parametrize("T, K", [(1000, 50), (100, 10)])
def test_likelihoods_on_a_short_chain_keep_every_early_step(T, K):
    early = range(1, T // K + 1)
    expected = sorted({*space_timesteps(T, K), *early})
    equal(space_timesteps(T, f"nll{K}"), expected)


@pytest.mark.equation("iddpm", "Eq. 19")
@pytest.mark.function("iddpm", "IDDPM.log_variance")
def test_a_strided_chain_has_the_authors_betas_and_posterior_variance():
    table = golden("respacing")["spaced"]["linear|10"]
    t = torch.tensor(table["timestep_map"]).view(-1, 1, 1, 1) + 1
    s = torch.cat([torch.zeros_like(t[:1]), t[:-1]])
    zero = torch.zeros(t.shape, dtype=torch.float64)
    model = IDDPM(constants(0, 1), 1, schedule="linear")
    _, beta_tilde = model.q_posterior(zero, zero, t, s)
    close(beta_tilde.flatten(), table["posterior_variance"], rtol=1e-8, what="beta_tilde")
    _, log_beta, _ = model.p_mean_variance(zero, t, s)
    close(log_beta.flatten().exp(), table["betas"], rtol=1e-8, what="beta, at v = 1")


@pytest.mark.equation("iddpm", "Eq. 19")
@pytest.mark.function("iddpm", "IDDPM.sample", "IDDPM.kept_steps")
def test_the_network_of_a_strided_chain_sees_the_original_t():
    net, calls = watched(lambda x, t, y: torch.cat([x, x], dim=1))
    last(IDDPM(net, 1).sample(torch.zeros(1, 1, 1, 1), steps="10,15,20"))
    expected = [t + 1 for t in golden("respacing")["timesteps"]["1000|10,15,20"]]
    equal([int(call.t) for call in calls], expected[::-1])


@pytest.mark.function("iddpm", "IDDPM.kept_steps")
def test_steps_may_be_a_list_or_ddims_quadratic_ones_too():
    model = IDDPM(constants(0, 0), 1)
    equal(model.kept_steps([3, 40]), [3, 40])
    equal(model.kept_steps("quad4"), [1, 112, 445, 1000])
    equal(model.kept_steps(None), list(range(1, 1001)))


def oracle(data, ab, v, **options):
    """IDDPM with the exact eps for this data, and this v."""
    net = halves(lambda x, t: data.eps(x, ab[t.long()]), lambda x, t: torch.full_like(x, v))
    return IDDPM(net, 1, **options)


@pytest.mark.equation("iddpm", "Eq. 19", "Eq. 15")
@pytest.mark.function("iddpm", "IDDPM.p_mean_variance", "IDDPM.sample")
def test_the_ten_step_chain_with_learned_variance_is_the_authors():
    table = golden("ddpm_samplers")
    x_T = tensor(table["inputs"]["x_T"])
    randn_like = tape(tensor(table["inputs"]["noise_tape"]))
    data = Gaussian(0.0, 0.5)
    model = oracle(data, linear_alpha_bar(), v=0.25, schedule="linear", clip=False)
    chain = states(model.sample(x_T, steps="10", randn_like=randn_like))
    expected = table["outputs"]["linear|10|p_sample|LEARNED_RANGE v=0.25|clip=False"]
    close(chain[0], expected["after_first_step"], rtol=1e-4, atol=1e-5, what="first step")
    close(chain[-1], expected["final"], rtol=1e-4, atol=1e-5, what="last step")


def optimal_v(data, ab, t, s):
    """The v that makes a step from t to s as wide as p(x_s | x_t) of Gaussian data."""
    if s == 0:
        return 0.0
    alpha = ab[t] / ab[s]
    beta = 1 - alpha
    beta_tilde = beta * (1 - ab[s]) / (1 - ab[t])
    prior = ab[s] * data.s**2 + 1 - ab[s]
    variance = 1 / (1 / prior + alpha / (1 - alpha))
    return (2 * (variance / beta_tilde).log() / (beta / beta_tilde).log() - 1).item()


@pytest.mark.equation("iddpm", "Eq. 15")
def test_with_the_optimal_variance_even_a_short_chain_has_the_data_s_spread():
    data = Gaussian()
    ab = cosine_alpha_bar()
    kept = space_timesteps(1000, 20)
    v_of = {t: optimal_v(data, ab, t, s) for t, s in zip(kept, [0, *kept])}

    def eps(x, t):
        return data.eps(x, ab[t.long()])

    def v(x, t):
        return torch.full_like(x, v_of[int(t[0])])

    noise = torch.randn(40_000, 1, 1, 1).double()
    learned = last(IDDPM(halves(eps, v), 1, clip=False).sample(noise, steps="20"))
    standard_error = data.s / math.sqrt(2 * 40_000)
    within(learned.std(), data.s, standard_error, what="the samples' spread", slack=1e-3)
    net = closed_form(lambda x, t, y: eps(x, t))
    model = IDDPM(net, 1, objective="simple", variance="large", clip=False)
    fixed = last(model.sample(noise, steps="20")).std()
    far = "with a fixed variance it is off by more than 0.02"
    holds(abs(fixed - data.s) > 0.02, far, spread=fixed)


@pytest.mark.equation("iddpm", "Eq. 19", "Eq. 15")
@pytest.mark.function("iddpm", "IDDPM.L_t", "IDDPM.p_mean_variance")
@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_the_bound_on_a_short_chain_is_that_of_the_kept_chain(v):
    model = IDDPM(constants(0, v), 1)
    bound = model.bits_per_dim(images(0.0), steps=50, randn_like=torch.zeros_like)
    a = cosine_alpha_bar()[[0, 1, 21, 42, 62]]  # "50" of 1000, as the authors keep them
    beta = 1 - a[1:] / a[:-1]
    beta_tilde = beta[1:] * (1 - a[1:-1]) / (1 - a[2:])
    beta_tilde = torch.cat([beta_tilde[:1], beta_tilde])
    variance = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()).exp()
    ratio = beta_tilde / variance  # without noise both means are 0
    expected = bits((-ratio.log() - 1 + ratio) / 2)
    expected[0] = -torch.log2(2 * tanh_cdf(1 / 255 / variance[0].sqrt()) - 1)
    close(bound["terms"][0, :4], expected, rtol=1e-6, atol=1e-9, what="L_0 to L_3")
