import functools
import inspect
import itertools
import math

import pytest
import torch
from explain import close, equal, holds, own_noise, within
from helpers import (
    Gaussian,
    asks_and_teaches,
    closed_form,
    cosine_alpha_bar,
    golden,
    halves,
    images,
    last,
    level,
    linear_alpha_bar,
    states,
    tape,
    tensor,
    watched,
    zero_net,
)

import edm
from ddpm import DDPM
from edm import (
    EDM,
    augment,
    denoiser,
    draw_warp,
    iddpm_levels,
    ode_invert,
    ode_sample,
    sigma_steps,
)
from iddpm import IDDPM
from pdm import PDM
from unet import UNet

COLUMNS = ("edm", "vp", "ve", "iddpm")
latent = tensor(golden("edm_sampler")["inputs"]["latent"])


def gauss(x, sigma, y=None):
    """The denoisers of the golden files: this one, and `mix`."""
    return x * 0.25 / (0.25 + sigma**2)


def mix(x, sigma, y=None):
    mean = tensor([0.6, -0.8])
    variance = 0.04 + sigma[..., None] ** 2
    away = (x[..., None] - mean) ** 2
    share = (tensor([0.7, 0.3]).log() - away / (2 * variance)).softmax(-1)
    of_each = (mean * sigma[..., None] ** 2 + x[..., None] * 0.04) / variance
    return (share * of_each).sum(-1)


def counted(D):
    """(D, the list of the noise levels at which it has been evaluated)."""
    levels = []

    def count(x, sigma, y=None):
        levels.append(sigma[0].item())
        return D(x, sigma)

    return count, levels


# Preconditioning: Table 1

@pytest.mark.equation("edm", "Table 1, EDM c_skip", "Table 1, EDM c_out", "Table 1, EDM c_in")
@pytest.mark.equation("edm", "Table 1, EDM c_noise", "Table 1, VE c_skip", "Table 1, VE c_out")
@pytest.mark.equation("edm", "Table 1, VE c_in", "Table 1, VE c_noise")
@pytest.mark.equation("edm", "Table 1, VP c_skip", "Table 1, VP c_out", "Table 1, VP c_in")
@pytest.mark.equation("edm", "Table 1, VP c_noise", "Table 1, iDDPM c_skip")
@pytest.mark.equation("edm", "Table 1, iDDPM c_out", "Table 1, iDDPM c_in")
@pytest.mark.equation("edm", "Table 1, iDDPM c_noise")
@pytest.mark.parametrize("precond", COLUMNS)
def test_the_coefficients_are_the_authors(precond):
    table = golden("edm_precond")
    expected = table["outputs"][precond]
    sigma = torch.tensor(table["inputs"]["sigma"])
    coefficients = EDM(zero_net, 1, precond=precond).coefficients(sigma.view(-1, 1, 1, 1))
    for name, value in zip(("c_skip", "c_out", "c_in", "c_noise"), coefficients):
        # Theirs of VP is .0403 at .002, a float32 rounding error
        first = 1 if (precond, name) == ("vp", "c_noise") else 0
        came = value.flatten()[first:]
        close(came, expected[name][first:], rtol=2e-6, atol=1e-6, what=name)


@pytest.mark.equation("edm", "Table 1, VP c_noise", "Table 1, VP schedule")
@pytest.mark.function("edm", "ColumnVP.t", "ColumnVP.coefficients")
def test_c_noise_of_vp_is_exact_at_the_lowest_noise_level():
    _, _, _, c_noise = EDM(zero_net, 1, precond="vp").coefficients(0.0020000000949949026)
    close(c_noise, 999 * 3.9841979161830325e-05)


@pytest.mark.function("edm", "EDM.round_sigma", "ColumnIDDPM.round_sigma")
@pytest.mark.parametrize("precond", COLUMNS)
def test_the_known_noise_levels_are_the_authors(precond):
    table = golden("edm_precond")
    expected = table["outputs"][precond]
    model = EDM(zero_net, 1, precond=precond)
    known = model.round_sigma(tensor(table["inputs"]["sigma"]))
    close(known, expected["round_sigma_float64"], rtol=1e-5)
    ends = [float(expected["sigma_min"]), float(expected["sigma_max"])]
    if precond != "vp":
        close([model.sigma_min, model.sigma_max], ends, rtol=5e-4, what="lowest and highest")


@pytest.mark.equation("edm", "Table 1, VP schedule")
@pytest.mark.function("edm", "ColumnVP.__init__", "ColumnVP.sigma")
def test_vp_is_trained_from_sigma_of_1e_5_to_sigma_of_1():
    model = EDM(zero_net, 1, precond="vp")
    close([model.sigma_min, model.sigma_max], [0.0010004976, 152.16697028], rtol=1e-7)


@pytest.mark.equation("edm", "Table 1, iDDPM steps")
@pytest.mark.function("edm", "iddpm_levels")
def test_the_iddpm_levels_are_the_authors():
    u = iddpm_levels()
    expected = golden("edm_precond")["outputs"]["iddpm"]
    close(u[:12], expected["u_first_12"], rtol=1e-4, what="the first 12")
    close(u[-6:], expected["u_last_6"], atol=5e-6, what="the last 6")
    close(u.sum(), expected["u_sum_float64"], rtol=1e-6, what="their sum")


@pytest.mark.equation("edm", "Table 1, iDDPM steps")
@pytest.mark.function("edm", "iddpm_levels")
def test_the_iddpm_levels_are_those_of_the_cosine_schedule():
    close(iddpm_levels().flip(0)[1:], level(cosine_alpha_bar())[1:], rtol=1e-6)


@pytest.mark.equation("edm", "Table 1, EDM c_skip", "Table 1, EDM c_out", "Table 1, EDM c_in")
@pytest.mark.parametrize("sigma", [0.01, 0.5, 30.0])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_inputs_and_targets_have_unit_variance_at_every_noise_level(sigma_data, sigma):
    B = 100_000
    x = sigma_data * torch.randn(B, 1, 1, 1)
    noisy = x + sigma * torch.randn(B, 1, 1, 1)
    model = EDM(zero_net, 1, sigma_data=sigma_data)
    c_skip, c_out, c_in, _ = model.coefficients(sigma)
    standard_error = 1 / math.sqrt(2 * B)
    within((c_in * noisy).std(), 1, standard_error, what="the network's input, App. B.6")
    target = (x - c_skip * noisy) / c_out
    within(target.std(), 1, standard_error, what="the network's target, App. B.6")


def optimal_F(precond, data):
    """The F of Eq. 7 for which D is optimal, from what the network sees alone."""

    def edm(x, c):
        sigma = (4 * c).exp()
        s = (sigma**2 + 0.25).sqrt()
        x = x * s
        return (data.D(x, sigma) - 0.25 / s**2 * x) / (sigma * 0.5 / s)

    def ve(x, c):
        sigma = 2 * c.exp()
        return (data.D(x, sigma) - x) / sigma

    def vp(x, c):
        t = c / 999
        return of_steps(x, (19.9 * t**2 / 2 + 0.1 * t).expm1().sqrt())

    def iddpm(x, c):
        u = level(cosine_alpha_bar()).flip(0)
        return of_steps(x, u[(999 - c).long()])

    def of_steps(x, sigma):
        x = x * (sigma**2 + 1).sqrt()
        return (data.D(x, sigma) - x) / -sigma

    F = {"edm": edm, "ve": ve, "vp": vp, "iddpm": iddpm}[precond]
    return closed_form(lambda x, c, y: F(x, c.double()))


@pytest.mark.equation("edm", "Eq. 7")
@pytest.mark.function("edm", "EDM.D")
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("precond", COLUMNS)
def test_the_preconditionings_of_one_optimal_network_agree_on_D(precond, sigma):
    data = Gaussian()
    model = EDM(optimal_F(precond, data), 1, precond=precond)
    sigma = model.round_sigma(tensor(sigma))
    x = sigma * torch.randn(8, 1, 1, 1).double()
    close(model.D(x, sigma), data.D(x, sigma), rtol=1e-5, atol=1e-5, what="D(x; sigma)")
    close(model(x, sigma), model.D(x, sigma), what="the model as a function")


@pytest.mark.function("edm", "EDM.D")
def test_the_network_runs_in_its_own_type_under_a_float64_state():
    def make_net(c_in, c_out):
        return UNet(c_in, c_out, width=8, mults=(1,), attention=())

    x = 3 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    D = EDM(make_net, 1).D(x, 3.0)
    equal(D.dtype, torch.float64)
    close(D, x * 0.25 / (9 + 0.25), what="c_skip x, not rounded: an untrained network says 0")
    equal(denoiser(DDPM(make_net, 1))(x, 3.0).dtype, torch.float64)


# Training

@pytest.mark.equation("edm", "Eq. 2")
@pytest.mark.function("edm", "EDM.weighted_error")
def test_training_gives_each_pixel_of_each_image_a_normal_noise_of_its_own():
    net, calls = watched()
    EDM(net, 2).loss(torch.zeros(64, 2, 4, 4).double())
    sigma = (4 * calls[0].t.double()).exp()
    c_in = (sigma**2 + 0.5**2).rsqrt()
    own_noise(calls[0].x / (c_in * sigma))  # the image is 0


@pytest.mark.equation("edm", "Eq. 8")
@pytest.mark.function("edm", "EDM.weighted_error")
def test_the_loss_asks_for_each_image_s_class_and_teaches_the_network():
    asks_and_teaches(lambda net: EDM(net, 1))


@pytest.mark.equation("edm", "Eq. 8", "Eq. 2", "Table 1, EDM weighting")
@pytest.mark.function("edm", "EDM.weighted_error", "ColumnEDM.loss_weight")
@pytest.mark.parametrize("P_mean", [-4.0, 0.0, 3.0])
def test_a_zero_network_s_loss_is_1_at_every_noise_level(P_mean):
    x = 0.5 * torch.randn(100_000, 1, 1, 1)
    loss = EDM(zero_net, 1, P_mean=P_mean, P_std=0.1).loss(x)
    within(loss, 1, math.sqrt(2 / len(x)))


@pytest.mark.equation("edm", "Eq. 8", "Eq. 2", "Table 1, EDM weighting", "Table 1, weighting")
@pytest.mark.function("edm", "EDM.weighted_error", "EDM.lambda_")
@pytest.mark.parametrize("column", ["edm", "vp", "ve"])
def test_the_weighted_error_is_the_authors(column, monkeypatch):
    case = golden("edm_loss")
    expected = case["outputs"][column]
    sigma = torch.tensor(expected["sigma"]).view(-1, 1, 1, 1)
    n = torch.tensor(expected["noise_times_sigma"])
    model = EDM(zero_net, 1, precond=column)
    monkeypatch.setattr(model, "D", lambda x, sigma, y=None, planes=None: gauss(x, sigma))
    monkeypatch.setattr(model, "draw_sigma", lambda B, device: sigma)
    monkeypatch.setattr(torch, "randn_like", lambda x: n / sigma)
    loss = model.loss(torch.tensor(case["inputs"]["images"]))
    close(loss, tensor(expected["loss_elementwise"]).mean(), rtol=1e-5)


@pytest.mark.equation("edm", "Table 1, EDM noise")
@pytest.mark.function("edm", "ColumnEDM.training_sigma", "EDM.draw_sigma")
def test_edm_trains_at_noise_levels_whose_logarithm_is_normal():
    B = 40_000
    sigma = EDM(zero_net, 1, P_mean=-0.7, P_std=0.9).draw_sigma(B)
    equal(sigma.shape, (B, 1, 1, 1))
    log_sigma = sigma.log()
    within(log_sigma.mean(), -0.7, 0.9 / math.sqrt(B), what="the mean of ln(sigma), P_mean")
    within(log_sigma.std(), 0.9, 0.9 / math.sqrt(2 * B), what="its spread, P_std")


def share_below(column, sigma):
    """The share of the training's noise levels that are below sigma: uniform in 0..1."""
    if column == "vp":
        root = (0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt()
        return (root - 0.1) / 19.9
    if column == "ve":
        return (sigma / 0.02).log() / math.log(100 / 0.02)
    levels = level(cosine_alpha_bar())[1:] * (1 + 1e-6)
    return torch.searchsorted(levels, sigma) / 999


@pytest.mark.equation("edm", "Table 1, VP noise", "Table 1, VE noise", "Table 1, iDDPM noise")
@pytest.mark.parametrize("column", ["vp", "ve", "iddpm"])
def test_each_other_column_trains_at_its_own_noise_levels(column):
    B = 40_000
    sigma = EDM(zero_net, 1, p_train=column).draw_sigma(B)
    equal(sigma.shape, (B, 1, 1, 1))
    sigma = sigma.flatten()
    holds(sigma.min() > 0, "every level is above 0", lowest=sigma.min())
    share = share_below(column, sigma).sort().values
    in_range = 0 <= share[0] and share[-1] <= 1
    holds(in_range, "levels lie in the column's range", lowest=sigma.min(), top=sigma.max())
    apart = (share - torch.linspace(0, 1, B)).abs().max()
    even = "they are spread as in the column, to 2 / sqrt(B) (Kolmogorov-Smirnov)"
    holds(apart < 2 / math.sqrt(B), even, farthest_apart=apart)


@pytest.mark.equation("edm", "Table 1, VP noise")
def test_vp_trains_down_to_t_of_1e_5(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.ones)  # the end of its range
    sigma = EDM(zero_net, 1, p_train="vp").draw_sigma(1)
    close(sigma.item(), math.expm1(19.9 * 1e-10 / 2 + 0.1 * 1e-5) ** 0.5, rtol=1e-5)


@pytest.mark.equation("edm", "Table 1, VE noise")
def test_ve_trains_from_0_02_to_100():
    sigma = EDM(zero_net, 1, p_train="ve").draw_sigma(40_000)
    holds(sigma.max() > 99.5, "the highest level is nearly 100", highest=sigma.max())
    holds(sigma.min() < 0.0201, "the lowest level is nearly 0.02", lowest=sigma.min())


@pytest.mark.equation("edm", "Table 1, iDDPM noise")
def test_iddpm_trains_at_u_0_to_the_last_before_0():
    sigma = EDM(zero_net, 1, p_train="iddpm").draw_sigma(40_000)
    expected = level(cosine_alpha_bar()[[-1, 1]])
    close(torch.stack([sigma.max(), sigma.min()]), expected, rtol=1e-6)


@pytest.mark.equation("edm", "Table 1, EDM weighting", "Table 1, weighting")
@pytest.mark.function("edm", "EDM.lambda_", "Column.loss_weight", "ColumnEDM.loss_weight")
@pytest.mark.parametrize("weight", COLUMNS)
def test_the_weight_can_be_another_column_s(weight):
    sigma = tensor([0.1, 2.0])
    expected = sigma**-2
    if weight == "edm":
        expected = (sigma**2 + 0.25) / (0.25 * sigma**2)
    close(EDM(zero_net, 1, weight=weight).lambda_(sigma), expected, what="lambda(sigma)")


@pytest.mark.function("edm", "EDM.__init__")
@pytest.mark.parametrize("part", ["precond", "p_train", "weight"])
def test_an_unknown_column_of_table_1_is_refused(part):
    with pytest.raises(ValueError, match="edm, vp, ve, iddpm"):
        EDM(zero_net, 1, **{part: "ddim"})


@pytest.mark.function("edm", "EDM.__init__")
def test_a_checkpoint_holds_what_was_learned_and_nothing_else():
    for precond in COLUMNS:
        equal(list(EDM(zero_net, 1, precond=precond).state_dict()), [])


@pytest.mark.function("edm", "sigma_steps", "noise_range")
@pytest.mark.parametrize("column, expected", [
    ("ve", (0.02, 100.0)), ("iddpm", (0.002, 81.0)), ("edm", (0.002, 80.0)),
])
def test_a_column_samples_between_its_own_noise_levels(column, expected):
    equal(edm.COLUMNS[column].sampling_range, expected)


@pytest.mark.function("edm", "EDM.__init__", "EDM.sample", "ode_sample", "ode_invert")
@pytest.mark.parametrize("function, expected", [
    (edm.COLUMNS["edm"], {"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}),
    (EDM.sample, {"steps": 18, "rho": 7.0, "S_churn": 0.0}),
    (EDM.sample, {"S_tmin": 0.0, "S_tmax": math.inf, "S_noise": 1.0}),
    (ode_invert, {"steps": 18, "rho": 3}),
    (EDM, {"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2, "precond": "edm"}),
    (ode_sample, {"steps": 18, "solver": "heun", "rho": 7.0, "alpha": 1.0}),
    (ode_sample, {"S_churn": 0.0, "S_tmin": 0.0, "S_tmax": math.inf, "S_noise": 1.0}),
])
def test_the_defaults_are_the_papers(function, expected):
    parameters = inspect.signature(function).parameters
    equal({name: parameters[name].default for name in expected}, expected)


# Any method is a denoiser

def ddpm(data, ab):
    return DDPM(closed_form(lambda x, t, y: data.eps(x, ab[t.long()])), 1)


def iddpm(data, ab):
    net = closed_form(lambda x, t, y: data.eps(x, ab[t.long()]))
    return IDDPM(net, 1, objective="simple")


def iddpm_of_learned_variance(data, ab):
    """D is its mean part."""
    net = halves(lambda x, t: data.eps(x, ab[t.long()]), lambda x, t: torch.full_like(x, 7))
    return IDDPM(net, 1)


def pdm(data, ab):
    net = closed_form(lambda x, t, y: data.eps(x, ab[t.long()]))
    return PDM(net, 1, patch=1, predict="eps")


@pytest.mark.equation("edm", "App. C.3", "Table 1, VP scaling")
@pytest.mark.function("edm", "StepDenoiser.__init__", "StepDenoiser.__call__")
@pytest.mark.parametrize("make, ab", [
    (ddpm, linear_alpha_bar()),
    (iddpm, cosine_alpha_bar()),
    (iddpm_of_learned_variance, cosine_alpha_bar()),
    (pdm, cosine_alpha_bar()),
], ids=["ddpm", "iddpm", "iddpm_of_learned_variance", "pdm"])
def test_a_network_trained_on_steps_is_a_denoiser_at_their_noise_levels(make, ab):
    data = Gaussian()
    D = denoiser(make(data, ab))
    sigma = level(ab)
    close([D.sigma_min, D.sigma_max], sigma[[1, -1]], what="the lowest and highest level")
    for t in (1, 300, 900):
        x = data.mu + sigma[t] * torch.randn(8, 1, 1, 1).double()
        came = D(x, sigma[t].item())
        expected = data.D(x, sigma[t])
        close(came, expected, rtol=1e-6, atol=1e-9, what=f"D at the level of t = {t}")
        close(D.round_sigma(1.0001 * sigma[t]), sigma[t], what="the nearest level")
        close(D(x, sigma[t].expand(8, 1, 1, 1) * 1.0001), came, what="D at a level nearby")


@pytest.mark.function("edm", "OwnDenoiser.__call__", "OwnDenoiser.__init__")
def test_an_edm_is_its_own_denoiser():
    model = EDM(zero_net, 1)
    x = torch.randn(2, 1, 4, 4)
    D = denoiser(model)
    equal((D.sigma_min, D.sigma_max), (0, math.inf), what="the lowest and highest level")
    equal(D.round_sigma(0.7), 0.7, what="the nearest level")
    equal(D(x, 2.0), model.D(x, 2.0))
    equal(model(x, 2.0), model.D(x, 2.0))


@pytest.mark.equation("edm", "App. C.3")
@pytest.mark.function("edm", "StepDenoiser.round_sigma", "rounded")
def test_a_ddpm_is_sampled_only_at_levels_that_it_knows():
    data = Gaussian()
    ab = linear_alpha_bar()
    net, calls = watched(lambda x, t, y: data.eps(x, ab[t.long()]))
    noise = torch.randn(200, 1, 1, 1).double()
    x = last(ode_sample(denoiser(DDPM(net, 1)), noise, steps=40, sigma_max=1e9))
    t = [int(call.t[0]) for call in calls]
    equal(len(t), 2 * 40 - 1, what="evaluations")
    equal([t[0], t[-1]], [1000, 1], what="the first t and the last")
    equal(t[1::2], t[2::2], what="the t of second slopes, and of the steps after them")
    error = (x - data.along_the_ode(noise, level(ab[-1]))).abs().max()
    holds(error < 0.02, "samples are where the ODE leads, to 0.02", farthest_off=error)


# Time steps

@pytest.mark.equation("edm", "Eq. 5")
@pytest.mark.parametrize("N", list(golden("edm_sampler")["sigma_grids"]))
def test_the_noise_levels_are_the_authors(N):
    expected = golden("edm_sampler")["sigma_grids"][N]
    sigmas = sigma_steps(int(N))
    if N == "256":
        close(sigmas[:12], expected["first"], what="the first 12")
        close(sigmas[-12:], expected["last"], what="the last 12")
    else:
        close(sigmas, expected)


@pytest.mark.equation("edm", "Table 1, VP time steps", "Table 1, VE time steps")
@pytest.mark.equation("edm", "Table 1, iDDPM steps", "Eq. 5")
@pytest.mark.function("edm", "ColumnVP.levels", "ColumnVE.levels", "ColumnIDDPM.levels")
@pytest.mark.parametrize("name", list(golden("edm_ablation")["sigma_grids"]))
def test_the_noise_levels_of_each_column_are_the_authors(name):
    expected = golden("edm_ablation")["sigma_grids"][name]
    if name == "iddpm":
        close(sigma_steps(18, name), expected, rtol=0, atol=3e-5)
    else:
        close(sigma_steps(18, name), expected)


@pytest.mark.equation("edm", "Table 1, VP time steps", "Table 1, VE time steps", "Eq. 5")
@pytest.mark.function("edm", "sigma_steps")
@pytest.mark.parametrize("discretization", COLUMNS)
def test_the_noise_levels_fall_from_sigma_max_to_sigma_min(discretization):
    sigmas = sigma_steps(12, discretization, 0.05, 7.0)
    tolerance = 0.2 if discretization == "iddpm" else 1e-9
    close(sigmas[[0, -1]], [7.0, 0.05], rtol=tolerance, what="the first and the last")
    rise = sigmas.diff().max()
    holds(rise < 0, "every level is below the one before", largest_change=rise)


@pytest.mark.equation("edm", "Table 1, iDDPM steps")
@pytest.mark.function("edm", "ColumnIDDPM.levels")
def test_a_range_of_iddpm_levels_includes_its_ends():
    u = iddpm_levels().tolist()
    close(sigma_steps(2, "iddpm", u[500], u[499]), [u[499], u[500]])
    with pytest.raises(ValueError, match="no two"):
        sigma_steps(2, "iddpm", u[500] * 0.9999, u[500] * 1.0001)
    with pytest.raises(ValueError, match="no two"):
        sigma_steps(2, "iddpm", u[500] * 1.0001, u[499] * 0.9999)


class Narrow:
    """A D that knows the noise levels 0.1 to 10 alone, and keeps those it is asked for."""

    sigma_min = 0.1
    sigma_max = 10.0

    def __init__(self):
        self.seen = []

    def __call__(self, x, sigma, y=None):
        self.seen.append(sigma.max().item())
        return 0 * x


@pytest.mark.function("edm", "noise_range")
@pytest.mark.parametrize("run", [
    lambda D, x, **options: last(ode_sample(D, x, **options)),
    ode_invert,
], ids=["ode_sample", "ode_invert"])
@pytest.mark.parametrize("given, expected", [
    ({}, (0.1, 10.0)),
    ({"sigma_min": 0.5, "sigma_max": 5.0}, (0.5, 5.0)),
    ({"sigma_min": 0.01, "sigma_max": 50.0}, (0.1, 10.0)),
])
def test_the_range_is_narrowed_to_what_the_network_knows(run, given, expected):
    D = Narrow()
    run(D, torch.ones(1, 1, 1, 1), steps=5, **given)
    close([min(D.seen), max(D.seen)], expected, rtol=1e-6)


# Algorithm 2

CHURN = {"S_churn": 40.0, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}
ROOT_2 = 2**0.5  # 1 + the largest gamma


def seen_by_algorithm_2(noise, randn_like=torch.zeros_like, **options):
    """[(x, sigma)] that D is asked for; its slope d is -tanh(x) everywhere.

    Column VE has c_in = 1 and ln(sigma / 2) for c_noise, so the network sees both.
    """
    net, calls = watched(lambda x, c_noise, y: x.tanh())
    model = EDM(net, 1, precond="ve")
    last(model.sample(noise, randn_like=randn_like, **options))
    return [(call.x, 2 * call.t.double().exp()) for call in calls]


@pytest.mark.equation("edm", "Algorithm 2, line 2")
@pytest.mark.function("edm", "EDM.sample")
def test_algorithm_2_begins_with_noise_of_level_t_0():
    noise = torch.randn(4, 1, 1, 1).double()
    x, sigma = seen_by_algorithm_2(noise, steps=2, sigma_max=9.0)[0]
    close(sigma, torch.full_like(sigma, 9.0), rtol=1e-6, what="t_0")
    close(x, 9 * noise, what="x_0")


@pytest.mark.equation("edm", "Algorithm 2, gamma_i", "Algorithm 2, line 5")
@pytest.mark.function("edm", "EDM.sample")
@pytest.mark.parametrize("S_churn, gamma", [(0.0, 0.0), (0.4, 0.2), (40.0, ROOT_2 - 1)])
def test_churn_raises_the_noise_level_from_t_to_t_hat(S_churn, gamma):
    noise = torch.randn(4, 1, 1, 1).double()
    _, t_hat = seen_by_algorithm_2(noise, steps=2, sigma_max=9.0, S_churn=S_churn)[0]
    close(t_hat, torch.full_like(t_hat, 9 * (1 + gamma)), rtol=1e-6, what="t_hat_0 of t_0 = 9")


@pytest.mark.equation("edm", "Algorithm 2, line 4", "Algorithm 2, line 6")
@pytest.mark.function("edm", "EDM.sample")
def test_churn_adds_the_noise_that_t_hat_has_more_than_t():
    noise = torch.randn(4, 1, 1, 1).double()
    fresh = torch.randn(4, 1, 1, 1).double()
    options = {"steps": 2, "sigma_max": 9.0, "S_churn": 40.0, "S_noise": 1.1}
    x_hat, _ = seen_by_algorithm_2(noise, lambda x: fresh, **options)[0]
    added = ((9 * ROOT_2) ** 2 - 9**2) ** 0.5
    close(x_hat, 9 * noise + added * 1.1 * fresh, what="x_hat_0")


@pytest.mark.equation("edm", "Algorithm 2, line 7", "Algorithm 2, line 8")
@pytest.mark.function("edm", "EDM.sample")
def test_the_euler_step_follows_the_slope_at_t_hat_from_t_hat():
    noise = torch.randn(4, 1, 1, 1).double()
    options = {"steps": 2, "sigma_max": 9.0, "sigma_min": 0.5, "S_churn": 40.0}
    (x_hat, _), (x, t_1), *_ = seen_by_algorithm_2(noise, **options)
    close(t_1, torch.full_like(t_1, 0.5), rtol=1e-6, what="t_1")
    h = 0.5 - 9 * ROOT_2
    close(x, x_hat - h * x_hat.tanh(), what="x_1 of Euler's step")


@pytest.mark.equation("edm", "Algorithm 2, line 10", "Algorithm 2, line 11")
@pytest.mark.function("edm", "EDM.sample")
def test_heun_s_step_follows_the_mean_of_both_slopes():
    noise = torch.randn(4, 1, 1, 1).double()
    options = {"steps": 2, "sigma_max": 9.0, "sigma_min": 0.5}
    (x_hat, _), (euler, _), (x, _) = seen_by_algorithm_2(noise, **options)
    h = 0.5 - 9
    close(x, x_hat - h * (x_hat.tanh() + euler.tanh()) / 2, what="x_1 of Heun's step")


@pytest.mark.equation("edm", "Algorithm 2, line 3", "Algorithm 2, line 9")
@pytest.mark.function("edm", "EDM.sample")
@pytest.mark.parametrize("steps", [2, 5, 18])
def test_every_step_has_two_slopes_but_the_last_one(steps):
    noise = torch.randn(4, 1, 1, 1).double()
    evaluations = seen_by_algorithm_2(noise, steps=steps)
    equal(len(evaluations), 2 * steps - 1, what="evaluations of D")


def stochastic_case():
    """The authors' stochastic sampler: (its options, the noise it drew, what came out)."""
    case = golden("edm_stochastic")
    S = case["inputs"]["settings"]["cifar_vp_pretrained"]
    draws = [tensor(n) for n in case["inputs"]["noise_tape"]]
    options = {
        "S_churn": S["S_churn"],
        "S_tmin": S["S_min"],
        "S_tmax": S["S_max"],
        "S_noise": S["S_noise"],
    }
    return options, draws, case["outputs"]["edm_sampler|cifar_vp_pretrained|gauss"]


@pytest.mark.equation("edm", "Algorithm 2, line 2", "Algorithm 2, line 3")
@pytest.mark.equation("edm", "Algorithm 2, gamma_i", "Algorithm 2, line 4")
@pytest.mark.equation("edm", "Algorithm 2, line 5", "Algorithm 2, line 6")
@pytest.mark.equation("edm", "Algorithm 2, line 7", "Algorithm 2, line 8")
@pytest.mark.equation("edm", "Algorithm 2, line 9", "Algorithm 2, line 10")
@pytest.mark.equation("edm", "Algorithm 2, line 11")
@pytest.mark.function("edm", "EDM.sample")
def test_algorithm_2_gives_the_authors_numbers():
    options, draws, expected = stochastic_case()
    model = EDM(optimal_F("edm", Gaussian(0.0, 0.5)), 1)
    x = last(model.sample(latent, randn_like=lambda x: draws.pop(0), **options))
    close(x, expected["x"], rtol=1e-5, atol=1e-5, what="the samples")
    equal(len(draws), 0, what="noise draws left over: one a step, used or not")


@pytest.mark.equation("edm", "Algorithm 2, line 2", "Algorithm 2, line 3")
@pytest.mark.equation("edm", "Algorithm 2, gamma_i", "Algorithm 2, line 4")
@pytest.mark.equation("edm", "Algorithm 2, line 5", "Algorithm 2, line 6")
@pytest.mark.equation("edm", "Algorithm 2, line 7", "Algorithm 2, line 8")
@pytest.mark.equation("edm", "Algorithm 2, line 9", "Algorithm 2, line 10")
@pytest.mark.equation("edm", "Algorithm 2, line 11")
@pytest.mark.function("edm", "EDM.sample", "ode_sample")
@pytest.mark.parametrize("precond", COLUMNS)
@pytest.mark.parametrize("options", [
    {}, {"steps": 5, "rho": 3.0}, {"sigma_min": 0.1, "sigma_max": 20.0}, CHURN,
], ids=["plain", "few steps", "narrow", "churn"])
def test_algorithm_2_and_the_general_solver_agree(precond, options):
    net = closed_form(lambda x, c, y: torch.tanh(x) * torch.cos(c / 100))
    model = EDM(net, 1, precond=precond)
    noise = torch.randn(4, 1, 2, 2).double()
    draws = torch.randn(18, 4, 1, 2, 2).double()
    plain = list(model.sample(noise, randn_like=tape(draws), **options))
    general = list(ode_sample(denoiser(model), noise, randn_like=tape(draws), **options))
    equal(len(plain), options.get("steps", 18), what="how many steps there are")
    for i, ((x, D), (x_general, D_general)) in enumerate(zip(plain, general)):
        close(D, D_general, rtol=1e-12, atol=1e-12, what=f"D of step {i}")
        close(x, x_general, rtol=1e-12, atol=1e-12, what=f"x after step {i}")


# The general solver

@pytest.mark.equation("edm", "Algorithm 1, line 4", "Algorithm 1, line 5")
@pytest.mark.equation("edm", "Algorithm 1, line 6")
@pytest.mark.function("edm", "ode_sample", "Path.dx_dt")
@pytest.mark.parametrize("key", list(golden("edm_sampler")["deterministic"]))
def test_the_deterministic_sampler_gives_the_authors_numbers(key):
    expected = golden("edm_sampler")["deterministic"][key]
    name, N, *rho = key.split("|")
    options = {"steps": int(N.removeprefix("N="))}
    if rho:
        options["rho"] = float(rho[0].removeprefix("rho="))
    D, levels = counted({"gauss": gauss, "mix": mix}[name])
    close(last(ode_sample(D, latent, **options)), expected["x"], atol=1e-12)
    if "nfe" in expected:
        equal(len(levels), expected["nfe"], what="evaluations")


@pytest.mark.function("edm", "Path.dx_dt", "sigma_of_each")
def test_the_denoiser_is_told_the_noise_level_of_each_image():
    shapes = []

    def D(x, sigma, y=None):
        shapes.append(tuple(sigma.shape))
        return gauss(x, sigma)

    last(ode_sample(D, latent, steps=2))
    equal(shapes, [(2, 1, 1, 1)] * 3)


@pytest.mark.equation("edm", "Algorithm 1, line 4", "Table 1, VP schedule")
@pytest.mark.equation("edm", "Table 1, VE schedule")
@pytest.mark.equation("edm", "Table 1, schedule", "Table 1, scaling", "Table 1, VP scaling")
@pytest.mark.function("edm", "Path.dx_dt", "Path.s", "Path.s_dot", "ode_sample")
@pytest.mark.parametrize("key", list(golden("edm_ablation")["outputs"]))
def test_every_choice_of_sampler_gives_the_authors_numbers(key):
    expected = golden("edm_ablation")["outputs"][key]
    _, solver, discretization, schedule, scaling = key.split("|")
    D, levels = counted(gauss)
    chain = ode_sample(
        D,
        latent,
        solver=solver,
        discretization=discretization,
        schedule=schedule,
        scaling=scaling,
    )
    # exp of VP rounds differently from one CPU to another, by 1.2e-6 at the end
    of_vp = "vp" in (discretization, schedule, scaling)
    tolerance = 5e-6 if of_vp else 1e-6
    close(last(chain).flatten(), expected["x"], rtol=tolerance, atol=tolerance)
    equal(len(levels), expected["nfe"], what="evaluations")


@pytest.mark.equation("edm", "Algorithm 1, line 4", "Algorithm 1, line 5")
@pytest.mark.equation("edm", "Algorithm 1, line 6", "Algorithm 3, line 4")
@pytest.mark.equation("edm", "Algorithm 3, line 6", "Algorithm 3, line 8")
@pytest.mark.equation("edm", "Algorithm 3, line 9")
@pytest.mark.function("edm", "ode_sample")
def test_the_stochastic_sampler_gives_the_authors_numbers():
    options, draws, expected = stochastic_case()
    D, levels = counted(gauss)
    x = last(ode_sample(D, latent, randn_like=lambda x: draws.pop(0), **options))
    close(levels, expected["sigmas_evaluated"], what="the noise levels of the evaluations")
    close(x, expected["x"], atol=1e-12, what="the samples")
    equal(len(draws), 0, what="noise draws left over: one a step, used or not")


@pytest.mark.equation("edm", "Algorithm 1, line 4", "Algorithm 1, line 5")
@pytest.mark.equation("edm", "Algorithm 1, line 6", "Algorithm 3, line 4")
@pytest.mark.equation("edm", "Algorithm 3, line 6", "Algorithm 3, line 8")
@pytest.mark.equation("edm", "Algorithm 3, line 9")
@pytest.mark.function("edm", "ode_sample", "Path.dx_dt")
@pytest.mark.parametrize("options, order", [
    ({"solver": "euler"}, 1),
    ({}, 2),
    ({"alpha": 0.5}, 2),
    ({"alpha": 2 / 3}, 2),
    ({"alpha": 1.1}, 2),
    ({"schedule": "vp", "scaling": "vp"}, 2),
    ({"schedule": "ve", "discretization": "ve"}, 2),
    ({"scaling": "vp", "discretization": "vp"}, 2),
])
def test_the_error_falls_as_this_power_of_the_step(options, order):
    data = Gaussian(0.3, 0.5)
    noise = torch.randn(64, 1, 1, 1).double()
    s = 1.0
    if "scaling" in options:
        s = 1 / (1 + 0.05**2) ** 0.5

    def error(steps):  # at sigma_min, before the last step, which is always Euler's
        chain = ode_sample(data.D, noise, steps=steps, sigma_min=0.05, sigma_max=80, **options)
        exact = data.along_the_ode(noise, 80.0, 0.05)
        return (states(chain)[-2] / s - exact).abs().max()

    ratio = error(129) / error(257)
    least = 2**order * 0.85
    most = 2 ** (order + 1)  # Ralston's comes near 8 on this linear equation
    words = f"halving the step divides the error by {least:.3g} to {most}"
    holds(least < ratio < most, words, divided_by=ratio)


@pytest.mark.equation("edm", "Algorithm 1, line 4", "Algorithm 1, line 5")
@pytest.mark.equation("edm", "Algorithm 1, line 6")
@pytest.mark.function("edm", "ode_sample")
def test_churn_leaves_the_distribution_alone():
    data = Gaussian(0.3, 0.5)
    B = 20_000
    x = last(ode_sample(data.D, torch.randn(B, 1, 1, 1), steps=64, S_churn=40.0))
    equal(x.dtype, torch.float32)
    within(x.mean(), 0.3, 0.5 / math.sqrt(B), what="the samples' mean")
    within(x.std(), 0.5, 0.5 / math.sqrt(2 * B), what="their spread", slack=0.005)


@pytest.mark.equation("edm", "Algorithm 1, line 4", "Algorithm 1, line 5")
@pytest.mark.equation("edm", "Algorithm 1, line 6")
@pytest.mark.function("edm", "ode_sample")
@pytest.mark.parametrize("options", [
    {"schedule": "vp", "scaling": "vp"}, {"schedule": "ve"}, {"scaling": "vp"},
])
def test_churn_works_under_every_schedule_and_scaling(options):
    data = Gaussian(0.3, 0.5)
    B = 20_000
    x = last(ode_sample(data.D, torch.randn(B, 1, 1, 1), steps=64, S_churn=20.0, **options))
    within(x.mean(), 0.3, 0.5 / math.sqrt(B), what="the samples' mean", slack=0.005)
    within(x.std(), 0.5, 0.5 / math.sqrt(2 * B), what="their spread", slack=0.01)


@pytest.mark.equation("edm", "Algorithm 2, gamma_i", "Algorithm 2, line 5")
@pytest.mark.function("edm", "ode_sample", "EDM.sample")
def test_a_little_churn_raises_each_noise_level_by_its_share():
    D, levels = counted(gauss)
    last(ode_sample(D, images(0.0), steps=5, solver="euler", S_churn=0.5))
    close(levels, 1.1 * sigma_steps(5), what="t_hat, for gamma = 0.5 / 5")


@pytest.mark.equation("edm", "Algorithm 2, gamma_i")
@pytest.mark.function("edm", "ode_sample", "EDM.sample")
@pytest.mark.parametrize("outside", [{"S_tmin": 81.0}, {"S_tmax": 0.001}])
def test_churn_acts_from_S_tmin_to_S_tmax_only(outside):
    noise = torch.randn(4, 1, 1, 1)
    D = Gaussian().D
    still = last(ode_sample(D, noise))
    close(last(ode_sample(D, noise, S_churn=40.0, **outside)), still)


@pytest.mark.equation("edm", "Algorithm 2, gamma_i")
@pytest.mark.function("edm", "ode_sample", "EDM.sample")
@pytest.mark.parametrize("sampler", ["EDM.sample", "ode_sample"])
def test_churn_acts_at_S_tmin_and_S_tmax_themselves(sampler):
    noise = torch.randn(4, 1, 1, 1)
    only = sigma_steps(18)[3].item()

    def sampled(**options):
        if sampler == "EDM.sample":
            return last(EDM(zero_net, 1).sample(noise, **options))
        return last(ode_sample(Gaussian().D, noise, **options))

    churned = sampled(S_churn=40.0, S_tmin=only, S_tmax=only)
    moved = (churned - sampled()).abs().max()
    holds(moved > 1e-4, "churn at one level moves the samples", farthest=moved)


@pytest.mark.equation("edm", "Algorithm 2, line 4")
@pytest.mark.function("edm", "ode_sample", "EDM.sample")
def test_S_noise_inflates_the_fresh_noise():
    B = 20_000

    def spread(S_noise):
        chain = ode_sample(
            Gaussian(0.3, 0.5).D, torch.randn(B, 1, 1, 1), S_churn=20.0, S_noise=S_noise
        )
        return last(chain).std()

    plain = spread(1.0)
    inflated = spread(1.1)
    more = "samples spread more at S_noise 1.1 than at 1, by 10 standard errors"
    holds(inflated > plain + 10 * 0.5 / math.sqrt(2 * B), more, at_1=plain, at_1_1=inflated)


@pytest.mark.function("edm", "ode_sample")
def test_labels_reach_the_denoiser():
    labels = []

    def D(x, sigma, y):
        labels.append(y.tolist())
        return x

    last(ode_sample(D, torch.zeros(2, 1, 1, 1), tensor([3, 4], torch.long), steps=2))
    equal(labels, [[3, 4]] * 3)


@pytest.mark.function("edm", "ode_sample")
@pytest.mark.parametrize("options, word", [
    ({"steps": 1}, "steps"),
    ({"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min"),
    ({"sigma_min": 0.0}, "sigma_min"),
    ({"rho": 0.0}, "rho"),
    ({"S_churn": -1.0}, "S_churn"),
    ({"S_noise": -1.0}, "S_noise"),
    ({"alpha": 0.0}, "alpha"),
    ({"alpha": -1.0}, "alpha"),
    ({"alpha": 1.6}, "alpha"),
    ({"alpha": 2.0, "steps": 2, "sigma_min": 1.0, "sigma_max": 2.0, "rho": 1.0}, "alpha"),
    ({"alpha": 1.3, "S_churn": 100.0}, "alpha"),
    ({"alpha": 1.3, "schedule": "vp"}, "alpha"),
    ({"alpha": 2.0, "steps": 2, "schedule": "vp"}, "alpha"),
    ({"solver": "rk4"}, "solver"),
    ({"discretization": "x"}, "discretization"),
    ({"schedule": "x"}, "schedule"),
    ({"scaling": "ve"}, "scaling"),
])
def test_options_that_cannot_be_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        last(ode_sample(gauss, latent, **options))


@pytest.mark.function("edm", "check_churn", "EDM.sample", "ode_sample")
def test_churn_that_cannot_be_is_refused_with_the_numbers_given():
    options = {"S_churn": -1.0, "S_tmin": 2.0, "S_noise": 3.0}
    for sample in (EDM(zero_net, 1).sample, functools.partial(ode_sample, gauss)):
        with pytest.raises(ValueError, match="got -1, 2 and 3"):
            last(sample(latent, **options))


@pytest.mark.function("edm", "check_times")
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_past_what_the_vp_schedule_reaches_is_refused(solver):
    options = {"solver": solver, "schedule": "vp", "scaling": "vp"}
    options |= {"sigma_min": 0.1, "sigma_max": 20.0}
    with pytest.raises(ValueError, match="vp schedule"):
        last(ode_sample(gauss, latent, S_churn=5.0, **options))
    x = last(ode_sample(gauss, latent, **options))
    holds(x.isfinite().all(), "without churn the samples are numbers", samples=x)


# Inversion

@pytest.mark.equation("edm", "Eq. 1", "Eq. 3", "Algorithm 1, upwards")
@pytest.mark.function("edm", "ode_invert")
def test_inverting_and_sampling_gives_the_image_back():
    data = Gaussian()
    x = data.draw(8)
    latent = ode_invert(data.D, x, steps=200)
    back = last(ode_sample(data.D, latent, steps=200, rho=3))
    close(back, x, atol=1e-3, what="the image again")


@pytest.mark.equation("edm", "Eq. 1", "Eq. 3", "Algorithm 1, upwards")
@pytest.mark.function("edm", "ode_invert")
def test_the_latent_is_where_the_ode_comes_from():
    data = Gaussian()
    x = data.draw(8)
    latent = ode_invert(data.D, x, steps=200)
    widened = ((0.4**2 + 80**2) / (0.4**2 + 0.002**2)) ** 0.5
    expected = (0.3 + (x - 0.3) * widened) / 80
    close(latent, expected, rtol=0, atol=0.01, what="the unit-variance latent")
    close(latent.std(), x.std() / 0.4, rtol=0, atol=0.01, what="its spread")


@pytest.mark.function("edm", "ode_invert")
def test_inversion_works_in_float64():
    types = set()

    def D(x, sigma, y=None):
        types.add(x.dtype)
        return gauss(x, sigma)

    ode_invert(D, torch.zeros(8, 1, 1, 1), steps=3)
    equal(types, {torch.float64})


# Augmentation: Table 6

@pytest.mark.equation("edm", "Table 6, enabled with", "Table 6, a_0")
@pytest.mark.function("edm", "augment", "draw_warp")
def test_at_probability_0_images_are_only_mirrored_half_the_time():
    x = torch.randn(400, 1, 4, 6)
    warped, labels = augment(x, 0.0)
    equal(labels.shape, (400, 9), what="shape of the labels")
    equal(labels[:, 1:], torch.zeros(400, 8), what="the labels but a_0")
    mirrored = labels[:, 0] == 1
    within(mirrored.sum(), 200, 10, what="how many of 400 are mirrored")
    expected = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    close(warped, expected, atol=1e-5, what="the images, mirrored where a_0 says so")


def turn(cos, sin):
    return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])


def source_of(pixels, labels, sign, H, W):
    """Where each pixel (2, H W) of a warped image comes from, by its labels; Table 6.

    (a_5, a_4) and (-a_5, a_4 + pi) have the same labels: sign chooses.
    """
    flip_x, flip_y, octaves, cos, sin, u, v, move_x, move_y = labels
    stretch = (u**2 + v**2).sqrt()
    axis = turn(u / stretch, v / stretch)
    factors = torch.stack([2 ** (0.2 * sign * stretch), 2 ** (-0.2 * sign * stretch)])
    forward = torch.diag(torch.stack([1 - 2 * flip_x, 1 - 2 * flip_y])) * 2 ** (0.2 * octaves)
    forward = axis @ torch.diag(factors) @ axis.T @ turn(cos + 1, -sin) @ forward
    moved = torch.stack([move_x * W / 8, move_y * H / 8])
    return torch.linalg.solve(forward, pixels - moved[:, None])


@pytest.mark.equation("edm", "Table 6, a_0", "Table 6, a_1", "Table 6, a_2", "Table 6, a_3")
@pytest.mark.equation("edm", "Table 6, a_4", "Table 6, a_5", "Table 6, a_6", "Table 6, a_7")
@pytest.mark.function("edm", "augment", "draw_warp", "scale", "rotation")
def test_the_labels_tell_exactly_where_each_pixel_came_from():
    H, W, B = 24, 32, 64
    x = (torch.arange(W) - (W - 1) / 2).expand(H, W)
    y = (torch.arange(H) - (H - 1) / 2)[:, None].expand(H, W)
    places = torch.stack([x, y]).float()  # each pixel's place about the centre
    warped, labels = augment(places.expand(B, 2, H, W), 1.0)
    pixels = places.flatten(1).double()
    edge = tensor([[W / 2 - 1], [H / 2 - 1]])
    checked = 0
    signs = []
    for image, label in zip(warped.flatten(2).double(), labels.double()):
        misfit = []
        for sign in (1, -1):
            source = source_of(pixels, label, sign, H, W)
            inside = (source.abs() < edge).all(0)
            misfit.append((image - source)[:, inside].abs().max().item())
        one = min(misfit) < 1e-3 < max(misfit)
        holds(one, "one of the two sources is exact, the other is not", pixels_off=misfit)
        along = 1 if misfit[0] < misfit[1] else -1
        signs.append(along if label[6] > 0 else -along)
        checked += inside.sum()
    share = checked / (B * H * W)
    holds(share > 0.3, "three pixels in ten come from inside the image", share=share)
    within(sum(signs), 0, B**0.5, what="stretches less squeezes of one label")


@pytest.mark.equation("edm", "Table 6, enabled with")
@pytest.mark.equation("edm", "Table 6, a_0", "Table 6, a_1", "Table 6, a_2", "Table 6, a_3")
@pytest.mark.equation("edm", "Table 6, a_4", "Table 6, a_5", "Table 6, a_6", "Table 6, a_7")
@pytest.mark.function("edm", "draw_warp")
def test_each_transform_has_its_share_and_its_spread():
    B, p = 20_000, 0.3
    labels = augment(torch.zeros(B, 1, 1, 1), p)[1]
    on = (labels != 0).double()
    names = ["a_0", "a_1", "a_2", "cos a_3", "sin a_3", "a_5 cos a_4", "a_5 sin a_4"]
    for k, share in {0: 0.5, 1: p / 2, 2: p, 4: p, 5: p}.items():
        standard_error = (share * (1 - share) / B) ** 0.5
        within(on[:, k].mean(), share, standard_error, what=f"the share with {names[k]}")
    within(on[:, 7].mean(), p, (p * (1 - p) / B) ** 0.5, what="the share with a_6")
    equal(on[:, 8], on[:, 7], what="whether there is an a_7, and an a_6")
    spreads = {2: 1.0, 4: 0.5**0.5, 5: 0.5**0.5, 6: 0.5**0.5, 7: 1.0, 8: 1.0}
    for k, spread in spreads.items():
        values = labels[:, k][labels[:, k] != 0]
        close(values.std(), spread, rtol=0, atol=0.06, what=f"the spread of label {k}")
        close(values.mean(), 0.0, rtol=0, atol=0.08, what=f"the mean of label {k}")


@pytest.mark.equation("edm", "Table 6, a_6", "Table 6, a_7", "Table 6, a_1")
@pytest.mark.function("edm", "draw_warp")
def test_images_that_are_moved_are_moved_and_mirrored_independently():
    labels = augment(torch.zeros(20_000, 1, 1, 1), 0.3)[1]
    moved = labels[labels[:, 7] != 0]
    n = len(moved)
    within((moved[:, 7] * moved[:, 8]).mean(), 0, 1 / n**0.5, what="the mean of a_6 a_7")
    upside_down = (moved[:, 1] != 0).double().mean()
    within(upside_down, 0.15, (0.15 * 0.85 / n) ** 0.5, what="the share with a_1")


@pytest.mark.equation("edm", "Table 6, a_3", "Table 6, a_4")
@pytest.mark.function("edm", "draw_warp")
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_every_angle_is_as_likely(p):
    labels = draw_warp(200_000, p, "cpu")[0].double()
    turned = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 4] != 0]
    stretched = torch.atan2(labels[:, 6], labels[:, 5])[labels[:, 5] != 0]
    for name, angle in {"a_3": turned, "a_4": stretched}.items():
        share = angle.sort().values / (2 * math.pi) + 0.5
        apart = (share - torch.linspace(0, 1, len(share)).double()).abs().max()
        even = f"{name} is spread evenly, to 2 / sqrt(n) (Kolmogorov-Smirnov)"
        holds(apart < 2 / len(share) ** 0.5, even, farthest_apart=apart)


@pytest.mark.equation("edm", "Table 6, a_4", "Table 6, a_5")
@pytest.mark.function("edm", "draw_warp")
def test_along_any_axis_images_shrink_as_often_as_they_stretch():
    labels, back, _ = draw_warp(100_000, 0.5, "cpu")
    alone = (labels[:, [0, 1, 2, 4]] == 0).all(1) & (labels[:, 5] != 0) & (labels[:, 6] > 0)
    along = labels[alone, 5:7]
    along = along / along.norm(dim=1, keepdim=True)
    factor = (along[:, None] @ back[alone] @ along[:, :, None]).flatten()
    share = (factor < 1).double().mean()
    within(share, 0.5, 0.5 / len(factor) ** 0.5, what="the share that stretches along a_4")


@pytest.mark.equation("edm", "Table 6, enabled with")
@pytest.mark.equation("edm", "Table 6, a_0", "Table 6, a_1", "Table 6, a_2", "Table 6, a_3")
@pytest.mark.equation("edm", "Table 6, a_4", "Table 6, a_5", "Table 6, a_6", "Table 6, a_7")
@pytest.mark.function("edm", "draw_warp")
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_no_transform_has_to_do_with_another(p):
    B = 20_000
    labels = augment(torch.zeros(B, 1, 1, 1), p)[1].double()
    a0, a1, a2, c, s, u, v, a6, a7 = labels.unbind(1)
    twice_turned = 2 * torch.atan2(s, c + 1)
    twice_axis = 2 * torch.atan2(v, u)
    size = u**2 + v**2
    parts = {
        "a_0": [a0],
        "a_1": [a1],
        "a_2": [a2, a2**2, a2 != 0],
        "a_3": [c, s, twice_turned.cos(), twice_turned.sin(), s != 0],
        "a_4, a_5": [u, v, size, twice_axis.cos(), twice_axis.sin(), size != 0],
        "a_6": [a6, a6**2, a6 != 0],
        "a_7": [a7, a7**2],
    }
    for one, other in itertools.combinations(parts, 2):
        if p < 1 and (one, other) == ("a_6", "a_7"):
            continue  # switched on together
        most = (standardized(parts[one]) @ standardized(parts[other]).T / B).abs().max()
        words = f"{one} and {other} are not correlated, to 6 / sqrt(B)"
        holds(most < 6 / B**0.5, words, largest_correlation=most)


def standardized(columns):
    """(k, B): each column with mean 0 and mean square 1, or 0 where it is constant."""
    rows = torch.stack([column.double() for column in columns])
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


@pytest.mark.function("edm", "EDM.loss", "EDM.sampling_planes", "EDM.D")
def test_the_network_is_told_what_was_done_in_training_and_nothing_in_sampling():
    asked = []
    net, calls = watched(lambda x, c_noise, y: x[:, :2])

    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return net(c_in, c_out)

    model = EDM(make_net, 2, augment=1.0)
    equal(asked, [(11, 2)], what="the network's channels in and out")
    model.loss(torch.randn(16, 2, 8, 8))
    planes = calls.pop().x[:, 2:]
    equal(planes.shape, (16, 9, 8, 8), what="shape of the planes")
    equal(planes, planes[:, :, :1, :1].expand_as(planes), what="planes, each constant")
    spread = planes.flatten(1).std(1).min()
    holds(spread > 0.1, "every image has its labels", smallest_spread=spread)
    last(model.sample(torch.randn(4, 2, 8, 8), steps=2))
    for call in calls:
        equal(call.x[:, 2:], torch.zeros(4, 9, 8, 8), what="planes in sampling")
