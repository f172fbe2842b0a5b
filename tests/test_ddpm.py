import math
from fractions import Fraction

import pytest
import torch
from explain import close, equal, holds, mean_within, own_noise, within
from helpers import (
    Gaussian,
    asks_and_teaches,
    closed_form,
    golden,
    images,
    last,
    level,
    linear_alpha_bar,
    same_net,
    states,
    tanh_cdf,
    tape,
    tensor,
    watched,
    zero_net,
)

from ddpm import DDPM, Chain, discretized_gaussian_log_likelihood, linear_betas, normal_kl

ab = linear_alpha_bar()


def oracle(data, **options):
    """DDPM with the exact network for this data."""
    return DDPM(closed_form(lambda x, t, y: data.eps(x, ab[t.long()])), 1, **options)


# Schedule

@pytest.mark.function("ddpm", "linear_betas")
@pytest.mark.parametrize("T", [1000, 4000])
def test_linear_betas_are_the_authors(T):
    table = golden("schedules")["outputs"][f"linear_{T}"]
    betas = linear_betas(T)
    close(betas[table["index"]], table["betas"])
    close(betas.sum(), table["betas_sum"], what="the sum of the betas")


@pytest.mark.equation("ddpm", "Eq. 4")
@pytest.mark.function("ddpm", "DDPM.__init__")
@pytest.mark.parametrize("T", [1000, 4000])
def test_alpha_bar_is_the_authors_cumulative_product(T):
    table = golden("schedules")["outputs"][f"linear_{T}"]
    alpha_bar = DDPM(zero_net, 1, T=T).alpha_bar[1:]
    close(alpha_bar[table["index"]], table["alphas_cumprod"])


@pytest.mark.equation("ddpm", "Eq. 4")
@pytest.mark.function("ddpm", "DDPM.__init__")
@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_alpha_bar_falls_from_one_at_t_0_to_almost_nothing_at_T(T):
    alpha_bar = DDPM(zero_net, 1, T=T).alpha_bar
    equal(alpha_bar.dtype, torch.float64)
    equal(alpha_bar.shape, (T + 1,))
    equal(alpha_bar[0].item(), 1.0)
    rise = alpha_bar.diff().max()
    holds(rise < 0, "alpha_bar falls at every step", largest_change=rise)
    holds(0 < alpha_bar[T] < 1e-4, "alpha_bar_T lies between 0 and 1e-4", came=alpha_bar[T])


@pytest.mark.function("ddpm", "Chain.__init__")
def test_a_checkpoint_holds_no_tables():
    equal(list(DDPM(zero_net, 1).state_dict()), [])


@pytest.mark.function("ddpm", "DDPM.__init__")
@pytest.mark.parametrize("T", [1, 20])
def test_a_chain_too_short_for_the_linear_schedule_is_refused(T):
    with pytest.raises(ValueError, match="larger T"):
        DDPM(zero_net, 1, T=T)


@pytest.mark.function("ddpm", "DDPM.__init__")
def test_two_steps_are_the_fewest():
    equal(DDPM(same_net, 1, T=2, beta_1=1e-4, beta_T=1e-4).T, 2)
    with pytest.raises(ValueError, match="T = 1"):
        DDPM(same_net, 1, T=1, beta_1=1e-4, beta_T=1e-4)


@pytest.mark.function("ddpm", "DDPM.__init__")
@pytest.mark.parametrize("betas", [{"beta_1": 0.0}, {"beta_1": -1e-4}, {"beta_T": 1.0}])
def test_a_beta_outside_0_to_1_is_refused(betas):
    with pytest.raises(ValueError, match="^beta_1 .* a beta outside"):
        DDPM(zero_net, 1, **betas)


@pytest.mark.function("ddpm", "DDPM.__init__")
@pytest.mark.parametrize("beta", [-0.5, 0.0, 1.0])
def test_given_betas_outside_0_to_1_are_refused(beta):
    with pytest.raises(ValueError, match="a beta outside"):
        DDPM(zero_net, 1, T=2, betas=tensor([beta, 0.5]))


@pytest.mark.function("ddpm", "DDPM.__init__")
def test_latents_are_not_clipped_and_have_no_bound():
    equal(DDPM.latent_config, {"clip": False, "objective": "simple"})


# Forward process

@pytest.mark.equation("ddpm", "Eq. 4")
@pytest.mark.function("ddpm", "Chain.q_sample")
def test_q_sample_is_sqrt_alpha_bar_of_the_image_and_noise_for_the_rest():
    x_0 = torch.randn(3, 2, 4, 4)
    eps = torch.randn(3, 2, 4, 4)
    t = (1, 500, 1000)
    ddpm = DDPM(zero_net, 2)
    x_t = ddpm.q_sample(x_0, torch.tensor(t).view(3, 1, 1, 1), eps)
    equal(x_t.dtype, torch.float32)
    for i, k in enumerate(t):
        expected = math.sqrt(ab[k]) * x_0[i].double() + math.sqrt(1 - ab[k]) * eps[i].double()
        close(x_t[i], expected, rtol=1e-5, atol=1e-6, what=f"x_t at t = {k}")
    one_t_for_all = ddpm.q_sample(x_0, 500, eps)
    close(one_t_for_all[1], x_t[1], rtol=1e-5, atol=1e-6, what="x_t at the number t = 500")


@pytest.mark.equation("ddpm", "Eq. 7")
@pytest.mark.function("ddpm", "Chain.q_posterior", "Chain.beta_tilde")
def test_the_posterior_has_the_authors_coefficients_and_variance():
    table = golden("schedules")["outputs"]["linear_1000"]
    t = torch.tensor(table["index"]).view(-1, 1, 1, 1) + 1
    one = torch.ones(t.shape, dtype=torch.float64)
    zero = torch.zeros(t.shape, dtype=torch.float64)
    ddpm = DDPM(zero_net, 1)
    of_x_0, variance = ddpm.q_posterior(one, zero, t)
    of_x_t, _ = ddpm.q_posterior(zero, one, t)
    close(of_x_0.flatten(), table["posterior_mean_coef1"], what="the factor of x_0")
    close(of_x_t.flatten(), table["posterior_mean_coef2"], what="the factor of x_t")
    close(variance.flatten(), table["posterior_variance"], what="beta_tilde")


@pytest.mark.equation("ddpm", "Eq. 7", "Eq. 2")
@pytest.mark.function("ddpm", "Chain.q_posterior", "Chain.beta_tilde", "Chain.beta")
def test_a_posterior_over_several_steps_is_bayes_rule_for_gaussians():
    t, s = 700, 300
    x_0 = tensor(0.3)
    x_t = tensor(-0.8)
    a = ab[t] / ab[s]  # q(x_t | x_s) = N(sqrt(a) x_s, 1 - a)
    precision = a / (1 - a) + 1 / (1 - ab[s])
    expected = (a.sqrt() * x_t / (1 - a) + ab[s].sqrt() * x_0 / (1 - ab[s])) / precision
    mean, variance = DDPM(zero_net, 1).q_posterior(x_0, x_t, t, s)
    close(mean, expected, what="the mean of q(x_300 | x_700, x_0)")
    close(variance, 1 / precision, what="the variance of q(x_300 | x_700, x_0)")


@pytest.mark.equation("ddpm", "Sec. 3.2", "Eq. 2")
@pytest.mark.function("ddpm", "DDPM.log_variance", "Chain.beta", "Chain.log_beta_tilde")
@pytest.mark.function("ddpm", "DDPM.p_mean_variance")
@pytest.mark.parametrize("variance, name", [
    ("small", "posterior_log_variance_clipped"),
    ("large", "fixed_large_log_variance"),
])
def test_the_fixed_variances_are_the_authors(variance, name):
    table = golden("schedules")["outputs"]["linear_1000"]
    t = torch.tensor(table["index"]).view(-1, 1, 1, 1) + 1
    x = torch.ones(t.shape, dtype=torch.float64)
    _, log_variance, _ = DDPM(zero_net, 1, variance=variance).p_mean_variance(x, t, t - 1)
    close(log_variance.flatten(), table[name], what="log sigma_t^2")


# Training

@pytest.mark.equation("ddpm", "Algorithm 1, line 3", "Algorithm 1, line 5")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_training_has_a_t_for_each_image_and_leaves_x_t_the_shape_of_x_0():
    net, calls = watched()
    try:
        DDPM(net, 1).loss(torch.zeros(3, 1, 1, 1))
    except RuntimeError as error:
        holds(False, "t is (B, 1, 1, 1), and x_t has the shape of x_0", torch_says=str(error))
    equal(calls[0].x.shape, torch.Size([3, 1, 1, 1]), what="the shape of x_t")


@pytest.mark.equation("ddpm", "Algorithm 1, line 3")
@pytest.mark.function("ddpm", "DDPM.draw_t", "DDPM.loss")
def test_training_draws_every_t_from_1_to_T_equally_often():
    net, calls = watched()
    for _ in range(10):
        DDPM(net, 1, T=50).loss(torch.zeros(10_000, 1, 1, 1))
    t = torch.cat([call.t for call in calls]).long().flatten()
    equal(sorted(t.unique().tolist()), list(range(1, 51)), what="the t that were drawn")
    within(t.bincount()[1:], 2000, math.sqrt(2000), what="how often each t was drawn")


@pytest.mark.equation("ddpm", "Algorithm 1, line 4")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_each_pixel_of_each_image_gets_a_normal_noise_of_its_own():
    net, calls = watched()
    DDPM(net, 2).loss(torch.zeros(64, 2, 4, 4).double())
    eps = calls[0].x / (1 - ab[calls[0].t.long()]).sqrt()  # the image is 0
    own_noise(eps)


@pytest.mark.equation("ddpm", "Eq. 14")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_the_loss_is_the_mean_square_over_all_pixels_of_eps_less_the_network_s_answer():
    answer = torch.randn(8, 2, 4, 4).double()
    net, calls = watched(lambda x, t, y: answer)
    loss = DDPM(net, 2).loss(torch.zeros(8, 2, 4, 4).double())
    eps = calls[0].x / (1 - ab[calls[0].t.long()]).sqrt()  # the image is 0
    close(loss, (eps - answer).square().mean(), what="the loss")


@pytest.mark.equation("ddpm", "Eq. 14")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_the_loss_asks_for_each_image_s_class_and_teaches_the_network():
    asks_and_teaches(lambda net: DDPM(net, 1))


@pytest.mark.equation("ddpm", "Eq. 14", "Algorithm 1, line 4")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_the_loss_of_a_network_that_predicts_nothing_is_one():
    loss = DDPM(zero_net, 1).loss(torch.zeros(1000, 1, 10, 10))
    within(loss, 1, math.sqrt(2 / 100_000), what="the mean square of eps")


@pytest.mark.equation("ddpm", "Eq. 14", "Algorithm 1, line 3", "Algorithm 1, line 4")
@pytest.mark.equation("ddpm", "Algorithm 1, line 5")
@pytest.mark.function("ddpm", "DDPM.loss")
def test_the_loss_of_the_exact_network_is_the_posterior_variance_of_the_noise():
    data = Gaussian()
    expected = (ab[1:] * data.s**2 / (ab[1:] * data.s**2 + 1 - ab[1:])).mean()
    losses = torch.stack([oracle(data).loss(data.draw(20_000)) for _ in range(8)])
    mean_within(losses, expected)
    holds(losses.std() < 0.02, "losses of one network are much alike", spread=losses.std())


# Reverse process

@pytest.mark.equation("ddpm", "Eq. 15")
@pytest.mark.function("ddpm", "DDPM.x_0_hat")
@pytest.mark.parametrize("t", [1, 10, 1000])
def test_predict_undoes_q_sample_when_the_noise_is_known(t):
    x_0 = torch.randn(4, 1, 2, 2).double()
    eps = torch.randn(4, 1, 2, 2).double()
    ddpm = DDPM(closed_form(lambda x, t, y: eps), 1)
    x_t = ab[t].sqrt() * x_0 + (1 - ab[t]).sqrt() * eps
    x_0_hat = ddpm.predict(x_t, t)
    close(x_0_hat, x_0, rtol=1e-6, atol=1e-9, what="x_0")


@pytest.mark.equation("ddpm", "Eq. 11")
@pytest.mark.function("ddpm", "DDPM.p_mean_variance")
@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_without_clipping_the_mean_is_equation_11(t):
    eps = torch.randn(2, 1, 2, 2).double()
    x_t = torch.randn(2, 1, 2, 2).double()
    ddpm = DDPM(closed_form(lambda x, t, y: eps), 1, clip=False)
    alpha = ab[t] / ab[t - 1]
    expected = (x_t - (1 - alpha) / (1 - ab[t]).sqrt() * eps) / alpha.sqrt()
    mean, _, _ = ddpm.p_mean_variance(x_t, t, t - 1)
    close(mean, expected, rtol=1e-6, what="mu_theta")


@pytest.mark.function("ddpm", "DDPM.p_mean_variance")
def test_in_a_short_chain_the_network_is_told_the_t_of_the_whole_one():
    net, calls = watched()
    ddpm = DDPM(net, 1)
    short = Chain(ddpm.alpha_bar, [100, 700])
    ddpm.p_mean_variance(images(0.5), 2, 1, chain=short)
    equal(calls[0].t.flatten().tolist(), [700.0], what="the t that the network is told")


@pytest.mark.function("ddpm", "DDPM.p_mean_variance", "DDPM.clip_if_asked")
def test_x_0_hat_is_clipped_before_the_mean_is_formed():
    x_t = images(3.0)
    ddpm = DDPM(zero_net, 1)
    mean, _, x_0_hat = ddpm.p_mean_variance(x_t, 500, 499)
    equal(x_0_hat, images(1.0), what="x_0_hat")
    expected, _ = ddpm.q_posterior(images(1.0), x_t, 500)
    close(mean, expected, what="the mean")


# Sampling

@pytest.mark.equation("ddpm", "Algorithm 2, line 1", "Algorithm 2, line 2")
@pytest.mark.equation("ddpm", "Algorithm 2, line 3", "Algorithm 2, line 4")
def test_the_ten_step_ancestral_chain_is_the_authors():
    table = golden("ddpm_samplers")
    x_T = tensor(table["inputs"]["x_T"])
    randn_like = tape(tensor(table["inputs"]["noise_tape"]))
    chain = states(oracle(Gaussian(0.0, 0.5)).sample(x_T, steps=10, randn_like=randn_like))
    expected = table["outputs"]["linear|10|p_sample|FIXED_LARGE|clip=True"]
    equal(len(chain), 10, what="how many steps the chain has")
    close(chain[0], expected["after_first_step"], rtol=1e-4, atol=1e-5, what="first step")
    close(chain[-1], expected["final"], rtol=1e-4, atol=1e-5, what="last step")


@pytest.mark.equation("ddpm", "DDIM Eq. 12")
def test_the_ten_step_ddim_chain_is_the_authors():
    table = golden("ddpm_samplers")
    x_T = tensor(table["inputs"]["x_T"])
    chain = states(oracle(Gaussian(0.0, 0.5)).sample(x_T, steps=10, eta=0.0))
    expected = table["outputs"]["linear|10|ddim eta=0.0|clip=True"]
    equal(len(chain), 10, what="how many steps the chain has")
    close(chain[0], expected["after_first_step"], rtol=1e-4, atol=1e-5, what="first step")
    close(chain[-1], expected["final"], rtol=1e-4, atol=1e-5, what="last step")


@pytest.mark.equation("ddpm", "DDIM Eq. 12")
def test_ddim_with_eta_0_adds_no_noise():
    noise = torch.randn(4, 1, 1, 1).double()
    ddpm = oracle(Gaussian())
    with_noise = last(ddpm.sample(noise, steps=10, eta=0.0))
    without = last(ddpm.sample(noise, steps=10, eta=0.0, randn_like=torch.zeros_like))
    equal(with_noise, without)


@pytest.mark.equation("ddpm", "Algorithm 2, line 2")
@pytest.mark.function("ddpm", "DDPM.kept_steps")
@pytest.mark.parametrize("T, steps, expected", [
    (1000, 10, [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
    (1000, 2, [1000, 1]),
    (1000, 1, [1000]),
    (50, None, list(range(50, 0, -1))),
])
def test_chains_run_from_T_to_1_and_the_network_sees_the_original_t(T, steps, expected):
    net, calls = watched()
    last(DDPM(net, 1, T=T).sample(torch.zeros(1, 1, 1, 1), steps=steps))
    equal([int(call.t) for call in calls], expected, what="the t that the network is told")


@pytest.mark.equation("ddpm", "DDIM App. D.2")
@pytest.mark.parametrize("T, count", [(1000, 2), (1000, 4), (1000, 10), (60, 8)])
def test_quadratic_steps_are_the_integer_part_of_c_k_squared_from_1_to_T(T, count):
    c = Fraction(T - 1, (count - 1) ** 2)
    expected = [1 + math.floor(c * k**2) for k in range(count)]
    net, calls = watched()
    last(DDPM(net, 1, T=T).sample(torch.zeros(1, 1, 1, 1), steps=f"quad{count}", eta=0.0))
    came = [int(call.t) for call in calls]
    equal(came, expected[::-1], what="the t that the network is told")
    equal((came[0], came[-1]), (T, 1), what="the first and the last t")


@pytest.mark.equation("ddpm", "DDIM App. D.2")
def test_quadratic_steps_that_coincide_are_one_step():
    kept = DDPM(zero_net, 1).kept_steps("quad50")
    equal(kept[:5], [1, 2, 4, 7, 11], what="the first of the kept t")
    equal(len(kept), 49, what="how many are kept")


@pytest.mark.function("ddpm", "DDPM.kept_steps")
def test_a_single_step_starts_from_T_however_steps_are_spaced():
    equal(DDPM(zero_net, 1).kept_steps("quad1"), [1000])


@pytest.mark.function("ddpm", "DDPM.kept_steps")
@pytest.mark.parametrize("steps", [
    0, 1001, "0", "1001", "quad0", "quad1001", "quad", "ddim50", "5,5", "-3", "quad-3", "",
])
def test_a_chain_of_no_steps_or_more_than_T_is_refused(steps):
    with pytest.raises(ValueError, match="1..1000"):
        last(DDPM(same_net, 1).sample(torch.zeros(1, 1, 1, 1), steps=steps))


@pytest.mark.function("ddpm", "DDPM.sample")
@pytest.mark.parametrize("eta", [1.5, -0.5])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        last(DDPM(zero_net, 1).sample(torch.zeros(1, 1, 1, 1), steps=10, eta=eta))


# Sampler convergence on Gaussian data

@pytest.mark.equation("ddpm", "Algorithm 2, line 4")
@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_ancestral_sampler_converges_to_the_data_as_steps_grow(variance):
    data = Gaussian()
    noise = torch.randn(30_000, 1, 1, 1).double()
    ddpm = oracle(data, variance=variance, clip=False)
    samples = [last(ddpm.sample(noise, steps=steps)) for steps in (10, 40, 160)]
    mean_error = abs(samples[-1].mean() - data.mu)
    holds(mean_error < 0.012, "the mean is off by less than 0.012", error=mean_error)
    errors = [abs(x.std() - data.s) for x in samples]  # statistical error 0.0016
    holds(errors[2] < 0.03, "the spread of 160 steps is off by less than 0.03", error=errors[2])
    for few, more in zip(errors, errors[1:]):
        holds(few > 2 * more, "four times the steps halve the error", few=few, more=more)


@pytest.mark.equation("ddpm", "DDIM Eq. 12")
def test_ddim_converges_to_the_exact_ode_at_least_linearly_in_the_steps():
    data = Gaussian()
    noise = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = data.along_the_ode(noise / (1 - ab[1000]).sqrt(), level(ab[1000]))  # DDIM Eq. 14
    ddpm = oracle(data, clip=False)
    samples = [last(ddpm.sample(noise, steps=steps, eta=0.0)) for steps in (20, 80, 320)]
    errors = [(x - exact).abs().max() for x in samples]
    holds(errors[2] < 0.015, "the error of 320 steps is below 0.015", error=errors[2])
    for few, more in zip(errors, errors[1:]):
        holds(few > 3 * more, "of four times the steps, a third", few=few, more=more)


@pytest.mark.equation("ddpm", "DDIM Eq. 16", "DDIM Eq. 12")
def test_ddim_with_eta_1_takes_the_ancestral_step_with_the_posterior_variance():
    noise = torch.randn(16, 1, 1, 1).double()
    z = torch.randn(16, 1, 1, 1).double()
    ddpm = oracle(Gaussian(), variance="small", clip=False)
    ddim = last(ddpm.sample(noise, steps=50, eta=1.0, randn_like=lambda x: z))
    ancestral = last(ddpm.sample(noise, steps=50, randn_like=lambda x: z))
    close(ddim, ancestral, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("ddpm", "DDIM Eq. 12", "Algorithm 2, line 4")
@pytest.mark.function("ddpm", "DDPM.ancestral", "DDPM.log_variance")
def test_sigma_hat_of_ddims_table_1_is_the_ancestral_chain_with_the_large_variance():
    x = torch.randn(16, 1, 1, 1).double()
    z = torch.randn(16, 1, 1, 1).double()
    data = Gaussian()
    ddpm = oracle(data, variance="large", clip=False)
    chain = states(ddpm.sample(x, steps=4, randn_like=lambda x: z))
    for came, t, s in zip(chain, (1000, 667, 334, 1), (667, 334, 1, 0)):
        eps = data.eps(x, ab[t])
        x_0_hat = (x - (1 - ab[t]).sqrt() * eps) / ab[t].sqrt()
        sigma = ((1 - ab[s]) / (1 - ab[t])).sqrt() * (1 - ab[t] / ab[s]).sqrt()  # of eta = 1
        sigma_hat = (1 - ab[t] / ab[s]).sqrt() if s > 0 else 0
        x = ab[s].sqrt() * x_0_hat + (1 - ab[s] - sigma**2).sqrt() * eps + sigma_hat * z
        close(came, x, rtol=1e-6, atol=1e-9, what=f"x after the step from {t} to {s}")


@pytest.mark.equation("ddpm", "DDIM Eq. 16", "DDIM Eq. 12")
def test_eta_scales_the_noise_between_none_and_beta_tilde():
    B = 20_000
    noise = torch.randn(B, 1, 1, 1).double()
    ddpm = oracle(Gaussian(), clip=False)
    half, _ = next(ddpm.sample(noise, steps=10, eta=0.5))
    none, _ = next(ddpm.sample(noise, steps=10, eta=0.0))
    beta_tilde = (1 - ab[889]) / (1 - ab[1000]) * (1 - ab[1000] / ab[889])
    sigma = 0.5 * beta_tilde.sqrt()
    c = ((1 - ab[889] - sigma**2) / (1 - ab[889])).sqrt()  # what is left of the direction
    eps = Gaussian().eps(noise, ab[1000])
    z = (half - none - (c - 1) * (1 - ab[889]).sqrt() * eps) / sigma
    within(z.std(), 1, 1 / math.sqrt(2 * B), what="the noise in units of eta sqrt(beta_tilde)")
    within(z.mean(), 0, 1 / math.sqrt(B), what="the noise's mean in these units")


# Variational bound

@pytest.mark.equation("ddpm", "Eq. 13, delta_+", "Eq. 13, delta_-")
def test_the_decoder_likelihood_is_the_authors():
    for case in golden("likelihood")["discretized_gaussian_log_likelihood"]:
        x = tensor(case["x"])
        mean = tensor(case["means"])
        nats = discretized_gaussian_log_likelihood(x, mean, tensor(case["log_scale"]))
        close(nats, case["log_prob_nats"], rtol=1e-6, what="log p(x_0) in nats")


@pytest.mark.equation("ddpm", "Eq. 13, delta_+", "Eq. 13, delta_-")
@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.97, -2.5), (-1.2, -0.5)])
def test_the_decoder_spreads_probability_1_over_the_256_pixel_values(mean, log_std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nats = discretized_gaussian_log_likelihood(x, tensor(mean), tensor(log_std))
    close(nats.exp().sum(), 1.0, rtol=1e-6, what="the sum over the pixel values")


@pytest.mark.function("ddpm", "normal_kl")
def test_the_kl_between_gaussians_is_the_authors():
    for case in golden("likelihood")["normal_kl"]:
        of_q = tensor(case["mean1"]), tensor(case["logvar1"])
        of_p = tensor(case["mean2"]), tensor(case["logvar2"])
        kl = normal_kl(*of_q, *of_p)
        close(kl, case["kl_nats"], rtol=1e-6, atol=1e-12, what="KL(q || p) in nats")


@pytest.mark.equation("ddpm", "Eq. 5, L_{t-1}", "Eq. 5, L_0")
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_terms_of_the_bound_are_the_authors(variance):
    table = golden("vlb")
    inputs = table["inputs"]
    outputs = table["outputs"][f"linear|EPSILON|FIXED_{variance.upper()}|clip=True"]
    x_0 = tensor(inputs["pixels"]) / 127.5 - 1
    t = torch.tensor(inputs["t_index"]).view(-1, 1, 1, 1) + 1
    eps = tensor(inputs["model_output_6ch"])[:, :3]
    ddpm = DDPM(closed_form(lambda x, t, y: eps), 3, variance=variance)
    x_t = ddpm.q_sample(x_0, t, tensor(inputs["noise"]))
    close(x_t, table["outputs"]["linear|x_t"], rtol=1e-3, atol=1e-5, what="x_t")
    mean, log_variance, x_0_hat = ddpm.p_mean_variance(x_t, t, t - 1)
    close(x_0_hat, outputs["pred_xstart"], rtol=1e-3, atol=1e-3, what="x_0_hat")
    close(mean, outputs["mean"], rtol=1e-3, atol=1e-5, what="the mean")
    log_variance = log_variance.expand_as(mean)
    close(log_variance, outputs["log_variance"], rtol=1e-3, what="log sigma_t^2")
    terms = ddpm.vlb_term(x_0, x_t, t, t - 1, mean, log_variance)
    close(terms, outputs["vb_terms_bpd"], rtol=1e-2, atol=1e-6, what="bits/dim of the terms")


def expected_terms(a, data, variance):
    """E[L_{t-1}], t = 1..K, in bits/dim, of the exact network without clipping.

    a (K + 1,) is the chain's alpha_bar. x_0 - mean of the first step is N(0, left) whatever
    x_1, if no bin is cut off, so L_0 is an integral over that.
    """
    beta = 1 - a[1:] / a[:-1]
    beta_tilde = beta[1:] * (1 - a[1:-1]) / (1 - a[2:])  # of steps 2..K
    beta_tilde = torch.cat([beta_tilde[:1], beta_tilde])
    v = beta_tilde.clone()
    if variance == "large":
        v[1:] = beta[1:]
    left = data.left(a[1:])
    off = (a[:-1].sqrt() * beta / (1 - a[1:])) ** 2 * left  # E (posterior mean - mean)^2
    terms = ((v / beta_tilde).log() - 1 + beta_tilde / v + off / v) / 2
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (-(z**2) / 2).exp()
    x = z * left[0].sqrt()
    inside = tanh_cdf((x + 1 / 255) / v[0].sqrt()) - tanh_cdf((x - 1 / 255) / v[0].sqrt())
    terms[0] = -(inside.log() * density).sum() / density.sum()
    return terms / math.log(2)


@pytest.mark.equation("ddpm", "Eq. 5", "Eq. 5, L_T", "Eq. 5, L_{t-1}", "Eq. 5, L_0")
@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_bound_of_the_exact_network_is_its_closed_form(variance, steps):
    T, n = 40, 40_000
    data = Gaussian(0.1, 0.2)
    alpha_bar = linear_alpha_bar(T)
    kept = list(range(1, T + 1))
    if steps == 10:
        kept = [round(1 + (T - 1) * i / 9) for i in range(10)]
    a = alpha_bar[[0] + kept]
    exact = closed_form(lambda x, t, y: data.eps(x, alpha_bar[t.long()]))
    ddpm = DDPM(exact, 1, T=T, variance=variance, clip=False)
    bound = ddpm.bits_per_dim(data.draw(n).clamp(-0.98, 0.98), steps=steps)
    shapes = {name: tuple(value.shape) for name, value in bound.items()}
    by_step = (n, len(kept))
    equal(shapes, {"total": (n,), "prior": (n,), "terms": by_step, "mse": by_step})
    close(bound["total"], bound["prior"] + bound["terms"].sum(1), what="the total")
    squares = a[-1] * (data.mu**2 + data.s**2)
    prior = (-1 - (1 - a[-1]).log() + 1 - a[-1] + squares) / 2 / math.log(2)
    mean_within(bound["prior"], prior, what="L_T")
    terms = expected_terms(a, data, variance)
    mean_within(bound["terms"], terms, what="the terms from L_0 on", slack=1e-9)
    mean_within(bound["mse"], data.left(a[1:]), what="the mean square error of x_0_hat")


@pytest.mark.equation("ddpm", "Eq. 5")
@pytest.mark.function("ddpm", "DDPM.bound", "DDPM.loss")
@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_bound_as_an_objective_is_the_sum_of_its_terms(variance):
    T = 40
    data = Gaussian(0.1, 0.2)
    alpha_bar = linear_alpha_bar(T)
    exact = closed_form(lambda x, t, y: data.eps(x, alpha_bar[t.long()]))
    ddpm = DDPM(exact, 1, T=T, variance=variance, clip=False, objective="bound")
    losses = [ddpm.loss(data.draw(20_000).clamp(-0.98, 0.98)) for _ in range(8)]
    expected = expected_terms(alpha_bar, data, variance).sum()
    mean_within(torch.stack(losses), expected, what="L without L_T, in bits/dim")


@pytest.mark.function("ddpm", "DDPM.bound")
def test_x_0_hat_is_not_clipped_in_training_on_the_bound():
    x_0 = images(0.9, 0.9).repeat(50, 1, 1, 1)
    net = closed_form(lambda x, t, y: torch.zeros_like(x))
    losses = []
    for clip in (True, False):
        torch.manual_seed(0)
        losses.append(DDPM(net, 1, clip=clip, objective="bound").loss(x_0))
    equal(losses[0], losses[1], what="the loss, whether samples are clipped or not")


@pytest.mark.function("ddpm", "DDPM.bound", "DDPM.loss")
def test_the_bound_asks_the_network_of_the_class_and_the_t_of_each_image():
    net, calls = watched()
    y = torch.arange(64)
    ddpm = DDPM(net, 1, objective="bound")
    loss = ddpm.loss(torch.zeros(64, 1, 4, 4, requires_grad=True), y)
    equal(len(calls), 1, what="how often the network is asked")
    equal(calls[0].y, y)
    holds(calls[0].t.unique().numel() > 32, "each image has a t of its own", t=calls[0].t)
    equal(loss.dtype, torch.float32)


@pytest.mark.equation("ddpm", "Eq. 5, L_0")
def test_a_pixel_far_from_the_mean_counts_in_float32_as_in_float64():
    ddpm = DDPM(closed_form(lambda x, t, y: 6 * torch.ones_like(x)), 1, clip=False)

    def first_term(x_0):  # 6 sigma off: float32 rounds its probability to none
        bound = ddpm.bits_per_dim(x_0, steps=10, randn_like=torch.zeros_like)
        return bound["terms"][0, 0]

    in_float32 = first_term(images(0.0, dtype=torch.float32))
    in_float64 = first_term(images(0.0))
    close(in_float32, in_float64, rtol=1e-4)
    holds(in_float64 > 26, "so far off it costs 26 bits", bits=in_float64)


@pytest.mark.function("ddpm", "DDPM.bits_per_dim")
def test_a_chain_of_one_step_has_no_bound():
    with pytest.raises(ValueError, match="2 steps"):
        DDPM(zero_net, 1).bits_per_dim(torch.zeros(1, 1, 1, 1), steps=1)


@pytest.mark.function("ddpm", "Chain.log_beta_tilde")
@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("T, steps, first_two", [
    (60, None, [1, 2]),
    (1000, 10, [1, 112]),
    (1000, [3, 40, 900], [3, 40]),
    (1000, [3, 40], [3, 40]),
])
def test_the_decoder_of_any_chain_has_the_variance_of_its_second_step(
    variance, T, steps, first_two
):
    ddpm = DDPM(zero_net, 1, variance=variance, T=T)
    bound = ddpm.bits_per_dim(images(0.0), steps=steps, randn_like=torch.zeros_like)
    a, b = linear_alpha_bar(T)[first_two]
    beta_tilde = (1 - a) / (1 - b) * (1 - b / a)
    bin_edge = 1 / 255 / beta_tilde.sqrt()  # without noise the mean is x_0
    expected = -torch.log2(2 * tanh_cdf(bin_edge) - 1)
    close(bound["terms"][0, 0], expected, rtol=1e-6, what="bits/dim of L_0")


@pytest.mark.function("ddpm", "Chain.log_beta_tilde", "Chain.beta")
def test_a_chain_of_one_step_has_the_variance_that_the_step_adds():
    chain = Chain(DDPM(zero_net, 1).alpha_bar, [1000])
    close(chain.log_beta_tilde(1, 0), (1 - ab[1000]).log(), what="log beta")


@pytest.mark.function("ddpm", "Chain.log_beta_tilde")
@pytest.mark.parametrize("t, s", [(2, 1), (9, 1), (9, 4)])
def test_over_several_steps_log_beta_tilde_is_that_of_both_ends(t, s):
    expected = (1 - ab[s]) / (1 - ab[t]) * (1 - ab[t] / ab[s])
    close(DDPM(zero_net, 1).log_beta_tilde(t, s), expected.log())


@pytest.mark.equation("ddpm", "Eq. 5, L_T")
def test_l_T_is_the_kl_from_what_is_left_of_the_image_to_pure_noise():
    ddpm = DDPM(zero_net, 1, beta_T=0.005)
    x_0 = images(0.5, -0.9)
    left = ddpm.alpha_bar[-1]
    early = "a chain that ends too early, so that every term counts"
    holds(0.05 < left < 0.1, early, alpha_bar_T=left)
    kl = (left * x_0**2 + (1 - left) - 1 - (1 - left).log()) / 2
    prior = ddpm.bits_per_dim(x_0, steps=2)["prior"]
    close(prior, kl.flatten() / math.log(2), what="L_T in bits/dim")


@pytest.mark.function("ddpm", "DDPM.bits_per_dim")
def test_the_bound_is_that_of_the_class():
    def its_label(x, t, y):
        return torch.zeros_like(x) if y is None else y.view(-1, 1, 1, 1) + 0 * x

    x_0 = images(0.0, 0.0, 0.0)
    ddpm = DDPM(closed_form(its_label), 1)
    bound = ddpm.bits_per_dim(x_0, torch.arange(3), steps=10, randn_like=torch.zeros_like)
    close(bound["mse"][:, 0], torch.arange(3) ** 2 * (1 - ab[1]) / ab[1], rtol=1e-6)
