import math

import pytest
import torch
from conftest import Gaussian, close, closed_form, golden, last, linear_alpha_bar, tensor

from ddpm import DDPM, discretized_gaussian_log_likelihood, linear_betas, normal_kl

ab = linear_alpha_bar()
zero = closed_form(lambda x, t, y: torch.zeros_like(x))


def oracle(data, **kw):  # DDPM with the exact network for this data
    return DDPM(closed_form(lambda x, t, y: data.eps(x, ab[t.long()])), 1, **kw)


# Schedule

@pytest.mark.parametrize("T", [1000, 4000])
def test_linear_betas_are_the_authors(T):
    table = golden("schedules")["outputs"][f"linear_{T}"]
    close(linear_betas(T)[table["index"]], table["betas"])
    close(linear_betas(T).sum(), table["betas_sum"])
    close(DDPM(zero, 1, T=T).alpha_bar[1:][table["index"]], table["alphas_cumprod"])


@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_the_linear_schedule_is_monotonic_from_one_at_t_0_to_almost_nothing_at_T(T):
    alpha_bar = DDPM(zero, 1, T=T).alpha_bar
    assert not DDPM(zero, 1, T=T).state_dict() and alpha_bar.dtype == torch.float64 and alpha_bar.shape == (T + 1,) and alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[T] < 1e-4


@pytest.mark.parametrize("T", [1, 20])
def test_a_chain_too_short_for_the_linear_schedule_is_refused(T):
    with pytest.raises(ValueError, match="larger T"):
        DDPM(zero, 1, T=T)


def test_two_steps_are_the_fewest():
    assert DDPM(closed_form(lambda x, t, y: x), 1, T=2, beta_1=1e-4, beta_T=1e-4).T == 2
    with pytest.raises(ValueError, match="T = 1"):
        DDPM(closed_form(lambda x, t, y: x), 1, T=1, beta_1=1e-4, beta_T=1e-4)


@pytest.mark.parametrize("betas", [dict(beta_1=0.0), dict(beta_1=-1e-4), dict(beta_T=1.0)])
def test_a_beta_outside_0_to_1_is_refused(betas):
    with pytest.raises(ValueError, match="beta outside"):
        DDPM(zero, 1, **betas)


# Forward process

def test_q_sample_is_the_signal_times_sqrt_alpha_bar_plus_noise_times_the_rest():
    x_0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([1, 500, 1000]).view(3, 1, 1, 1)
    x_t = DDPM(zero, 2).q_sample(x_0, t, eps)
    assert x_t.dtype == torch.float32
    for i, k in enumerate((1, 500, 1000)):
        close(x_t[i], math.sqrt(ab[k]) * x_0[i].double() + math.sqrt(1 - ab[k]) * eps[i].double(), rtol=1e-5, atol=1e-6)
    close(DDPM(zero, 2).q_sample(x_0, 500, eps)[1], x_t[1], rtol=1e-5, atol=1e-6)


def test_the_posterior_has_the_authors_coefficients_and_variance():
    table, ddpm = golden("schedules")["outputs"]["linear_1000"], DDPM(zero, 1)
    t = torch.tensor(table["index"]).view(-1, 1, 1, 1) + 1
    one, none = torch.ones(t.shape, dtype=torch.float64), torch.zeros(t.shape, dtype=torch.float64)
    close(ddpm.q_posterior(one, none, t)[0].flatten(), table["posterior_mean_coef1"])
    close(ddpm.q_posterior(none, one, t)[0].flatten(), table["posterior_mean_coef2"])
    close(ddpm.q_posterior(one, one, t)[1].flatten(), table["posterior_variance"])
    small, large = (DDPM(zero, 1, variance=v).p_mean_variance(one, t, t - 1)[1].flatten() for v in ("small", "large"))
    close(small, table["posterior_log_variance_clipped"])
    close(large, table["fixed_large_log_variance"])


def test_a_posterior_over_several_steps_is_bayes_rule_for_gaussians():
    t, s = 700, 300
    x_0, x_t = tensor(0.3), tensor(-0.8)
    a = ab[t] / ab[s]                                       # q(x_t | x_s) = N(sqrt(a) x_s, 1 - a)
    precision = a / (1 - a) + 1 / (1 - ab[s])
    mean = (a.sqrt() * x_t / (1 - a) + ab[s].sqrt() * x_0 / (1 - ab[s])) / precision
    got_mean, got_variance = DDPM(zero, 1).q_posterior(x_0, x_t, t, s)
    close(got_mean, mean)
    close(got_variance, 1 / precision)


# Training

def test_the_loss_of_a_network_that_predicts_nothing_is_one():
    assert abs(DDPM(zero, 1).loss(torch.zeros(100_000, 1, 1, 1)) - 1) < 5 * math.sqrt(2 / 100_000)


def test_the_loss_of_the_exact_network_is_the_posterior_variance_of_the_noise():
    data = Gaussian()
    expected = (ab[1:] * data.s ** 2 / (ab[1:] * data.s ** 2 + 1 - ab[1:])).mean()
    losses = torch.stack([oracle(data).loss(data.draw(20_000)) for _ in range(8)])
    assert abs(losses.mean() - expected) < 5 * losses.std() / math.sqrt(8) and losses.std() < 0.02


def test_training_draws_every_t_from_1_to_T_equally_often():
    seen = []
    DDPM(closed_form(lambda x, t, y: seen.append(t) or x), 1, T=50).loss(torch.zeros(100_000, 1, 1, 1))
    counts = seen[0].long().flatten().bincount(minlength=51)
    assert len(counts) == 51 and counts[0] == 0 and (counts[1:] - 2000).abs().max() < 5 * math.sqrt(2000)


# Reverse process

def test_predict_undoes_q_sample_when_the_noise_is_known():
    x_0, eps = torch.randn(4, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double()
    for t in (1, 10, 1000):
        ddpm = DDPM(closed_form(lambda x, t, y: eps), 1)
        close(ddpm.predict(ddpm.q_sample(x_0, t, eps), t), x_0, rtol=1e-6, atol=1e-9)


def test_without_clipping_the_mean_is_equation_11():
    eps, x_t = torch.randn(2, 1, 2, 2).double(), torch.randn(2, 1, 2, 2).double()
    ddpm = DDPM(closed_form(lambda x, t, y: eps), 1, clip=False)
    for t in (1, 2, 500, 1000):
        alpha = ab[t] / ab[t - 1]
        close(ddpm.p_mean_variance(x_t, t, t - 1)[0], (x_t - (1 - alpha) / (1 - ab[t]).sqrt() * eps) / alpha.sqrt(), rtol=1e-6)


def test_x_0_hat_is_clipped_before_the_mean_is_formed():
    x_t = torch.full((1, 1, 1, 1), 3.0).double()
    mean, _, x_0_hat = DDPM(zero, 1).p_mean_variance(x_t, 500, 499)
    assert x_0_hat.item() == 1
    close(mean, DDPM(zero, 1).q_posterior(torch.ones_like(x_t), x_t, 500)[0])


@pytest.mark.parametrize("name, kw, options", [
    ("linear|10|p_sample|FIXED_LARGE|clip=True", {}, {}),
    ("linear|10|ddim eta=0.0|clip=True", {}, {"eta": 0.0})])
def test_ten_step_chains_are_the_authors(name, kw, options):
    table = golden("ddpm_samplers")
    tape = iter(tensor(table["inputs"]["noise_tape"]))
    chain = oracle(Gaussian(0.0, 0.5)).sample(tensor(table["inputs"]["x_T"]), steps=10, randn_like=lambda x: next(tape), **options)
    states = [x for x, _ in chain]
    assert len(states) == 10
    close(states[0], table["outputs"][name]["after_first_step"], rtol=1e-4, atol=1e-5)
    close(states[-1], table["outputs"][name]["final"], rtol=1e-4, atol=1e-5)


def test_short_chains_run_from_T_to_1_and_the_network_sees_the_original_t():
    seen = []
    ddpm = DDPM(closed_form(lambda x, t, y: seen.append(t[0].item()) or x), 1)
    last(ddpm.sample(torch.zeros(1, 1, 1, 1), steps=10))
    assert seen == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    seen.clear()
    last(ddpm.sample(torch.zeros(1, 1, 1, 1), steps=1))
    last(ddpm.sample(torch.zeros(1, 1, 1, 1), steps=2))
    assert seen == [1000, 1000, 1]
    with pytest.raises(ValueError, match="1..1000"):
        last(ddpm.sample(torch.zeros(1, 1, 1, 1), steps=1001))


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_chain_of_no_steps_or_more_than_T_is_refused(steps):
    with pytest.raises(ValueError, match="1..1000"):
        last(DDPM(closed_form(lambda x, t, y: x), 1).sample(torch.zeros(1, 1, 1, 1), steps=steps))


def test_the_whole_chain_visits_every_t_once():
    seen = []
    last(DDPM(closed_form(lambda x, t, y: seen.append(t[0].item()) or x), 1, T=50).sample(torch.zeros(1, 1, 1, 1)))
    assert seen == list(range(50, 0, -1))


# Sampler convergence on Gaussian data

def spread(chain, data):  # how far the samples' mean and standard deviation are from the data's
    x = last(chain)
    return abs(x.mean() - data.mu).item(), abs(x.std() - data.s).item()


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_ancestral_sampler_converges_to_the_data_as_steps_grow(variance):
    data, noise = Gaussian(), torch.randn(30_000, 1, 1, 1).double()
    ddpm = oracle(data, variance=variance, clip=False)
    errors = [spread(ddpm.sample(noise, steps=k), data) for k in (10, 40, 160)]
    assert errors[0][1] > 2 * errors[1][1] > 4 * errors[2][1] and errors[2][1] < 0.03      # statistical error 0.0016
    assert errors[2][0] < 0.012                                                            # 5 standard errors


def ddim_error(data, steps):  # of eta = 0, against the exact solution of DDIM's Eq. 14
    noise = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = ((1 - ab[1000]) / ab[1000]).sqrt()
    exact = data.mu + (noise / ab[1000].sqrt() - data.mu) * data.s / (data.s ** 2 + sigma ** 2).sqrt()
    return (last(oracle(data, clip=False).sample(noise, steps=steps, eta=0.0)) - exact).abs().max().item()


def test_the_ddim_sampler_converges_to_the_exact_ode_at_least_linearly_in_the_steps():
    data = Gaussian()
    errors = [ddim_error(data, k) for k in (20, 80, 320)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.015


def test_ddim_with_eta_1_takes_the_ancestral_step_with_the_posterior_variance():
    data, noise, z = Gaussian(), torch.randn(16, 1, 1, 1).double(), torch.randn(16, 1, 1, 1).double()
    ddpm = oracle(data, variance="small", clip=False)
    a, b = (last(ddpm.sample(noise, steps=50, eta=eta, randn_like=lambda x: z)) for eta in (1.0, None))
    close(a, b, rtol=1e-6, atol=1e-9)


def test_eta_scales_the_noise_between_none_and_beta_tilde():
    noise = torch.randn(20_000, 1, 1, 1).double()
    ddpm = oracle(Gaussian(), clip=False)
    (a, _), (b, _) = next(ddpm.sample(noise, steps=10, eta=0.5)), next(ddpm.sample(noise, steps=10, eta=0.0))
    sigma = 0.5 * ((1 - ab[889]) / (1 - ab[1000]) * (1 - ab[1000] / ab[889])).sqrt()
    c = ((1 - ab[889] - sigma ** 2) / (1 - ab[889])).sqrt()                                     # what is left of the direction
    eps = Gaussian().eps(noise, ab[1000])
    z = (a - b - (c - 1) * (1 - ab[889]).sqrt() * eps) / sigma
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * 20_000) and abs(z.mean()) < 5 / math.sqrt(20_000)


# Variational bound

def test_the_decoder_likelihood_is_the_authors():
    for case in golden("likelihood")["discretized_gaussian_log_likelihood"]:
        x, mean = tensor(case["x"]), tensor(case["means"])
        close(discretized_gaussian_log_likelihood(x, mean, tensor(case["log_scale"])), case["log_prob_nats"], rtol=1e-6)


def test_the_decoder_spreads_one_unit_of_probability_over_the_256_pixel_values():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_std in ((0.0, -1.0), (0.97, -2.5), (-1.2, -0.5)):
        close(discretized_gaussian_log_likelihood(x, tensor(mean), tensor(log_std)).exp().sum(), 1.0, rtol=1e-6)


def test_the_kl_between_gaussians_is_the_authors():
    for case in golden("likelihood")["normal_kl"]:
        close(normal_kl(*(tensor(case[k]) for k in ("mean1", "logvar1", "mean2", "logvar2"))), case["kl_nats"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_terms_of_the_bound_are_the_authors(variance):
    table = golden("vlb")
    inputs, outputs = table["inputs"], table["outputs"][f"linear|EPSILON|FIXED_{variance.upper()}|clip=True"]
    x_0 = tensor(inputs["pixels"]) / 127.5 - 1
    t = torch.tensor(inputs["t_index"]).view(-1, 1, 1, 1) + 1
    ddpm = DDPM(closed_form(lambda x, t, y: tensor(inputs["model_output_6ch"])[:, :3]), 3, variance=variance)
    x_t = ddpm.q_sample(x_0, t, tensor(inputs["noise"]))
    mean, log_variance, x_0_hat = ddpm.p_mean_variance(x_t, t, t - 1)
    close(x_t, table["outputs"]["linear|x_t"], rtol=1e-3, atol=1e-5)
    close(mean, outputs["mean"], rtol=1e-3, atol=1e-5)
    close(log_variance.expand_as(mean), outputs["log_variance"], rtol=1e-3)
    close(x_0_hat, outputs["pred_xstart"], rtol=1e-3, atol=1e-3)
    close(ddpm.vlb_term(x_0, x_t, t, t - 1, mean, log_variance), outputs["vb_terms_bpd"], rtol=1e-2, atol=1e-6)


def bound(chain_alpha_bar, data, variance):
    """E of prior and terms t = 1..N, bits/dim, of the exact network without clipping on a chain with these alpha_bar; L_0 by quadrature."""
    a, N = chain_alpha_bar, len(chain_alpha_bar) - 1
    prior = 0.5 * (-1 - (1 - a[N]).log() + 1 - a[N] + a[N] * (data.mu ** 2 + data.s ** 2))
    terms = []
    for k in range(1, N + 1):
        beta = 1 - a[k] / a[k - 1]
        beta_tilde = beta * (1 - a[k - 1]) / (1 - a[k]) if k > 1 else (1 - a[2] / a[1]) * (1 - a[1]) / (1 - a[2])
        v = beta if variance == "large" and k > 1 else beta_tilde
        left = data.s ** 2 * (1 - a[k]) / (a[k] * data.s ** 2 + 1 - a[k])                       # Var(x_0 | x_t)
        if k > 1:
            off = (a[k - 1].sqrt() * beta / (1 - a[k])) ** 2 * left                            # E (posterior mean - mean)^2
            terms.append(0.5 * ((v / beta_tilde).log() - 1 + beta_tilde / v + off / v))
        else:                                            # x_0 - mean is N(0, left) whatever x_1, if no bin is cut off
            off = torch.linspace(-6, 6, 4001, dtype=torch.float64)
            z = torch.stack([off * left.sqrt() + 1 / 255, off * left.sqrt() - 1 / 255]) / v.sqrt()
            upper, lower = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
            weight = (-off ** 2 / 2).exp()
            terms.append(-((upper - lower).log() * weight).sum() / weight.sum())
    return prior / math.log(2), torch.stack(terms) / math.log(2)


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_bound_of_the_exact_network_is_its_closed_form(variance, steps):
    T, n = 40, 40_000
    data, a = Gaussian(0.1, 0.2), linear_alpha_bar(T)
    kept = list(range(1, T + 1)) if steps is None else [round(1 + (T - 1) * i / 9) for i in range(10)]
    prior, terms = bound(a[[0] + kept], data, variance)
    ddpm = DDPM(closed_form(lambda x, t, y: data.eps(x, a[t.long()])), 1, T=T, variance=variance, clip=False)
    seen = ddpm.bits_per_dim(data.draw(n).clamp(-0.98, 0.98), steps=steps)
    assert seen["terms"].shape == seen["mse"].shape == (n, len(kept)) and seen["prior"].shape == seen["total"].shape == (n,)
    close(seen["total"], seen["prior"] + seen["terms"].sum(1))
    assert abs(seen["prior"].mean() - prior) < 5 * seen["prior"].std() / math.sqrt(n)
    assert ((seen["terms"].mean(0) - terms).abs() < 5 * seen["terms"].std(0) / math.sqrt(n) + 1e-9).all()
    left = data.s ** 2 * (1 - a[kept]) / (a[kept] * data.s ** 2 + 1 - a[kept])
    assert ((seen["mse"].mean(0) - left).abs() < 5 * seen["mse"].std(0) / math.sqrt(n)).all()


def test_the_bound_counts_a_pixel_far_from_the_mean_in_float32_as_in_float64():
    ddpm = DDPM(closed_form(lambda x, t, y: 6 * torch.ones_like(x)), 1, clip=False)
    x_0, nothing = torch.zeros(1, 1, 1, 1), torch.zeros_like                                    # 6 sigma off: float32 rounds it to none
    a, b = (ddpm.bits_per_dim(x, steps=10, randn_like=nothing)["terms"][0, 0] for x in (x_0, x_0.double()))
    close(a, b, rtol=1e-4)
    assert b > 26


def test_a_chain_of_one_step_has_no_bound():
    with pytest.raises(ValueError, match="2 steps"):
        DDPM(zero, 1).bits_per_dim(torch.zeros(1, 1, 1, 1), steps=1)


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps", [None, 10, [3, 40, 900]])
def test_the_decoder_of_any_chain_has_the_posterior_variance_of_that_chain_s_second_step(variance, steps):
    chain, T = (steps or [1, 2]) if steps != 10 else [1, 112], 60 if steps is None else 1000
    x_0, ddpm = torch.zeros(1, 1, 1, 1).double(), DDPM(zero, 1, variance=variance, T=T)         # without noise the mean is x_0
    a, b = linear_alpha_bar(T)[chain[:2]]
    z = 1 / 255 / ((1 - a) / (1 - b) * (1 - b / a)).sqrt()
    expected = -torch.log2(torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    close(ddpm.bits_per_dim(x_0, steps=steps, randn_like=torch.zeros_like)["terms"][0, 0], expected, rtol=1e-6)


def test_l_T_is_the_kl_from_what_is_left_of_the_image_to_pure_noise():
    ddpm, x_0 = DDPM(zero, 1, beta_T=0.005), torch.tensor([0.5, -0.9], dtype=torch.float64).view(2, 1, 1, 1)
    left = ddpm.alpha_bar[-1]
    assert 0.05 < left < 0.1                                     # a chain that ends too early, so that every term counts
    kl = (left * x_0 ** 2 + (1 - left) - 1 - (1 - left).log()) / 2
    close(ddpm.bits_per_dim(x_0, steps=2)["prior"], kl.flatten() / math.log(2))


def test_the_bound_is_that_of_the_class():
    ddpm = DDPM(closed_form(lambda x, t, y: torch.zeros_like(x) if y is None else y.view(-1, 1, 1, 1) + 0 * x), 1)
    x_0 = torch.zeros(3, 1, 1, 1).double()
    mse = ddpm.bits_per_dim(x_0, torch.arange(3), steps=10, randn_like=torch.zeros_like)["mse"]
    close(mse[:, 0], torch.arange(3) ** 2 * (1 - ab[1]) / ab[1], rtol=1e-6)


@pytest.mark.parametrize("eta", [1.5, -0.5])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        last(DDPM(zero, 1).sample(torch.zeros(1, 1, 1, 1), steps=10, eta=eta))
