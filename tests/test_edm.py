import inspect
import math

import pytest
import torch
from conftest import Gaussian, close, closed_form, cosine_alpha_bar, golden, last, linear_alpha_bar, tensor

from ddpm import DDPM
from edm import EDM, augment, denoiser, iddpm_levels, ode_invert, ode_sample, sigma_steps
from iddpm import IDDPM
from pdm import PDM
from unet import UNet

COLUMNS = ("edm", "vp", "ve", "iddpm")


def optimal(data):  # E[y | y + n] of Gaussian data
    return lambda x, sigma, y=None: (data.s ** 2 * x + sigma ** 2 * data.mu) / (data.s ** 2 + sigma ** 2)


def exact_ode(data, noise, sigma_max=80.0):  # where the ODE carries sigma_max * noise, at sigma = 0
    return data.mu + (sigma_max * noise - data.mu) * data.s / (data.s ** 2 + sigma_max ** 2) ** 0.5


def silent(channels=1, **kw):  # F = 0
    return EDM(closed_form(lambda x, c, y: torch.zeros_like(x[:, :channels])), channels, **kw)


def gauss(x, sigma, y=None):  # the denoisers of the golden files
    return x * 0.25 / (0.25 + sigma ** 2)


def mix(x, sigma, y=None):
    m, v = tensor([0.6, -0.8]), 0.04 + sigma[..., None] ** 2
    r = (tensor([0.7, 0.3]).log() - (x[..., None] - m) ** 2 / (2 * v)).softmax(-1)
    return (r * (m * sigma[..., None] ** 2 + x[..., None] * 0.04) / v).sum(-1)


latent = tensor(golden("edm_sampler")["inputs"]["latent"])


# Preconditioning: Table 1

@pytest.mark.parametrize("precond", COLUMNS)
def test_the_coefficients_are_the_authors(precond):
    table = golden("edm_precond")
    sigma, expected, model = torch.tensor(table["inputs"]["sigma"]), table["outputs"][precond], silent(precond=precond)
    for name, value in zip(("c_skip", "c_out", "c_in", "c_noise"), model.coefficients(sigma.view(-1, 1, 1, 1))):
        first = 1 if (precond, name) == ("vp", "c_noise") else 0  # theirs is .0403 at .002, a float32 rounding error
        close(value.flatten()[first:], expected[name][first:], rtol=2e-6, atol=1e-6)
    if precond == "vp":
        close(model.coefficients(0.0020000000949949026)[3], 999 * 3.9841979161830325e-05)
        close([model.sigma_min, model.sigma_max], [0.0010004976, 152.16697028], rtol=1e-7)
    else:
        close([model.sigma_min, model.sigma_max], [float(expected["sigma_min"]), float(expected["sigma_max"])], rtol=5e-4)
    close(model.round_sigma(sigma.double()), expected["round_sigma_float64"], rtol=1e-5)


def test_the_iddpm_levels_are_the_authors_and_those_of_the_cosine_schedule():
    u, expected = iddpm_levels(), golden("edm_precond")["outputs"]["iddpm"]
    close(u[:12], expected["u_first_12"], rtol=1e-4)
    close(u[-6:], expected["u_last_6"], atol=5e-6)
    close(u.sum(), expected["u_sum_float64"], rtol=1e-6)
    ab = cosine_alpha_bar()
    close(u.flip(0)[1:], ((1 - ab) / ab).sqrt()[1:], rtol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_inputs_and_targets_have_unit_variance_at_every_noise_level(sigma_data):  # App. B.6
    model, B = silent(sigma_data=sigma_data), 100_000
    for sigma in (0.01, 0.5, 30.0):
        y, n = sigma_data * torch.randn(B, 1, 1, 1), sigma * torch.randn(B, 1, 1, 1)
        c_skip, c_out, c_in, _ = model.coefficients(sigma)
        assert abs((c_in * (y + n)).std() - 1) < 5 / math.sqrt(2 * B)
        assert abs(((y - c_skip * (y + n)) / c_out).std() - 1) < 5 / math.sqrt(2 * B)


@pytest.mark.parametrize("precond", COLUMNS)
def test_the_preconditionings_of_one_optimal_network_agree_on_D(precond):
    data, ab = Gaussian(), cosine_alpha_bar()
    u = ((1 - ab) / ab).sqrt().flip(0)
    def fn(x, c, y):  # F as Eq. 7 needs it, from what the network sees alone
        c = c.double()
        sigma = {"edm": lambda: (4 * c).exp(), "ve": lambda: 2 * c.exp(), "iddpm": lambda: u[(999 - c).long()],
                 "vp": lambda: (19.9 * (c / 999) ** 2 / 2 + 0.1 * c / 999).expm1().sqrt()}[precond]()
        s = (sigma ** 2 + 0.25).sqrt()
        skip, out, scale = {"edm": (0.25 / s ** 2, sigma * 0.5 / s, s), "ve": (1, sigma, 1)}.get(precond, (1, -sigma, (sigma ** 2 + 1).sqrt()))
        x = x * scale
        return (optimal(data)(x, sigma) - skip * x) / out
    model = EDM(closed_form(fn), 1, precond=precond)
    x = torch.randn(8, 1, 1, 1).double()
    for sigma in (0.1, 1.0, 10.0):
        sigma = model.round_sigma(tensor(sigma))
        close(model.D(x * sigma, sigma), optimal(data)(x * sigma, sigma), rtol=1e-5, atol=1e-5)
        close(model(x * sigma, sigma), model.D(x * sigma, sigma))


# Training

def test_a_zero_network_s_loss_is_1_at_every_noise_level():
    x = 0.5 * torch.randn(100_000, 1, 1, 1)
    for P_mean in (-4.0, 0.0, 3.0):
        assert abs(silent(P_mean=P_mean, P_std=0.1).loss(x) - 1) < 5 * math.sqrt(2 / len(x))


@pytest.mark.parametrize("column", ["edm", "vp", "ve"])
def test_the_weighted_error_is_the_authors(column, monkeypatch):
    case = golden("edm_loss")
    expected, x = case["outputs"][column], torch.tensor(case["inputs"]["images"])
    sigma, n = torch.tensor(expected["sigma"]).view(-1, 1, 1, 1), torch.tensor(expected["noise_times_sigma"])
    model = silent(precond=column)
    model.D = lambda x, sigma, y=None, planes=None: x * 0.25 / (0.25 + sigma ** 2)
    monkeypatch.setattr(model, "draw_sigma", lambda B, device: sigma)
    monkeypatch.setattr(torch, "randn_like", lambda x: n / sigma)
    close(model.loss(x), tensor(expected["loss_elementwise"]).mean(), rtol=1e-5)


@pytest.mark.parametrize("column", COLUMNS)
def test_each_column_trains_at_its_own_noise_levels(column):
    sigma = silent(p_train=column, P_mean=-0.7, P_std=0.9).draw_sigma(40_000).flatten()
    assert sigma.shape == (40_000,)
    if column == "edm":
        mean, std = sigma.log().mean(), sigma.log().std()
        assert abs(mean + 0.7) < 5 * 0.9 / 200 and abs(std - 0.9) < 5 * 0.9 / 282
        return
    ab = cosine_alpha_bar()
    uniform = {"vp": lambda: ((0.1 ** 2 + 2 * 19.9 * (1 + sigma ** 2).log()).sqrt() - 0.1) / 19.9, "ve": lambda: (sigma / 0.02).log() / math.log(100 / 0.02),
               "iddpm": lambda: torch.searchsorted(((1 - ab) / ab).sqrt()[1:] * (1 + 1e-6), sigma) / 999}[column]()
    assert uniform.min() >= 0 and uniform.max() <= 1 and sigma.min() > 0
    if column == "ve":
        assert sigma.max() > 99.5 and sigma.min() < 0.0201
    if column == "iddpm":                                                        # u_0 to u_{M-1}, each of them
        close([sigma.max(), sigma.min()], ((1 - ab[[-1, 1]]) / ab[[-1, 1]]).sqrt(), rtol=1e-6)
    assert (uniform.sort()[0] - torch.linspace(0, 1, 40_000)).abs().max() < 2 / 200  # Kolmogorov-Smirnov


@pytest.mark.parametrize("weight", COLUMNS)
def test_the_weight_can_be_another_column_s(weight):
    sigma = tensor([0.1, 2.0])
    close(silent(weight=weight).lambda_(sigma), (sigma ** 2 + 0.25) / (0.25 * sigma ** 2) if weight == "edm" else sigma ** -2)


def test_the_network_runs_in_its_own_type_under_a_float64_state():
    model = EDM(lambda i, o: UNet(i, o, width=8, mults=(1,), attention=()), 1)
    x = 3 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    D = model.D(x, 3.0)
    assert D.dtype == torch.float64
    close(D, x * 0.25 / (9 + 0.25))  # an untrained network adds nothing: no float32 rounding of x
    assert denoiser(DDPM(lambda i, o: UNet(i, o, width=8, mults=(1,), attention=()), 1))(x, 3.0).dtype == torch.float64


# Any method is a denoiser

@pytest.mark.parametrize("make, ab", [
    (lambda net: DDPM(net, 1), linear_alpha_bar()), (lambda net: IDDPM(net, 1, objective="simple"), cosine_alpha_bar()),
    (lambda net: IDDPM(lambda i, o: torch.nn.Sequential(), 1), cosine_alpha_bar()), (lambda net: PDM(net, 1, patch=1, predict="eps"), cosine_alpha_bar())])
def test_a_network_trained_on_steps_is_a_denoiser_at_their_noise_levels(make, ab):
    data = Gaussian()
    method = make(closed_form(lambda x, t, y: data.eps(x, ab[t.long()])))
    if isinstance(method.net, torch.nn.Sequential):  # learned variance: D is the mean part
        method.net = closed_form(lambda x, t, y: torch.cat([data.eps(x, ab[t.long()]), 7 * torch.ones_like(x)], 1))(1, 2)
    D, sigma = denoiser(method), ((1 - ab) / ab).sqrt()
    close([D.sigma_min, D.sigma_max], [sigma[1], sigma[-1]])
    for t in (1, 300, 900):
        x = data.mu + sigma[t] * torch.randn(8, 1, 1, 1).double()
        close(D(x, sigma[t].item()), optimal(data)(x, sigma[t]), rtol=1e-6, atol=1e-9)
        close(D.round_sigma(1.0001 * sigma[t]), sigma[t])
        close(D(x, sigma[t].expand(8, 1, 1, 1) * 1.0001), D(x, sigma[t]))


def test_an_edm_is_its_own_denoiser():
    model, x = silent(), torch.randn(2, 1, 4, 4)
    D = denoiser(model)
    assert (D.sigma_min, D.sigma_max) == (0, math.inf) and D.round_sigma(0.7) == 0.7
    assert torch.equal(D(x, 2.0), model.D(x, 2.0)) and torch.equal(model(x, 2.0), model.D(x, 2.0))


@pytest.mark.parametrize("precond", COLUMNS)
@pytest.mark.parametrize("options", [
    {}, dict(steps=5, rho=3.0), dict(sigma_min=0.1, sigma_max=20.0), dict(S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003)])
def test_algorithm_2_and_the_general_solver_agree(precond, options):
    net = closed_form(lambda x, c, y: torch.tanh(x) * torch.cos(c / 100))
    model = EDM(net, 1, precond=precond)
    noise = torch.randn(4, 1, 2, 2).double()
    chains = []
    for run in (model.sample, lambda *a, **kw: ode_sample(denoiser(model), *a, **kw)):
        tape = iter(torch.randn(18, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double())
        chains.append([torch.stack(pair) for pair in run(noise, randn_like=lambda x: next(tape), **options)])
    assert len(chains[0]) == options.get("steps", 18)
    for a, b in zip(*chains):
        close(a, b, rtol=1e-12, atol=1e-12)


def test_churn_past_what_the_vp_schedule_reaches_is_refused():
    options = dict(schedule="vp", scaling="vp", sigma_min=0.1, sigma_max=20.0, S_churn=5.0)
    for solver in ("euler", "heun"):
        with pytest.raises(ValueError, match="vp schedule"):
            last(ode_sample(gauss, latent, solver=solver, **options))
    assert last(ode_sample(gauss, latent, solver="euler", **options | dict(S_churn=0.0))).isfinite().all()


def test_a_ddpm_is_sampled_only_at_levels_that_it_knows():
    asked, data, ab = [], Gaussian(), linear_alpha_bar()
    model = DDPM(closed_form(lambda x, t, y: asked.append(t[0].item()) or data.eps(x, ab[t.long()])), 1)
    noise = torch.randn(200, 1, 1, 1).double()
    x = last(ode_sample(denoiser(model), noise, steps=40, sigma_max=1e9))
    assert asked[0] == 1000 and asked[-1] == 1 and len(asked) == 79 and asked[1::2] == asked[2::2]
    assert (x - exact_ode(data, noise, ((1 - ab[-1]) / ab[-1]).sqrt())).abs().max() < 0.02


# Time steps

def test_the_noise_levels_are_the_authors():
    for N, expected in golden("edm_sampler")["sigma_grids"].items():
        if N == "256":
            close(sigma_steps(256)[:12], expected["first"])
            close(sigma_steps(256)[-12:], expected["last"])
        else:
            close(sigma_steps(int(N)), expected)
    for name, expected in golden("edm_ablation")["sigma_grids"].items():
        close(sigma_steps(18, name), expected, **dict(rtol=0, atol=3e-5) if name == "iddpm" else dict(rtol=1e-9))


@pytest.mark.parametrize("discretization", COLUMNS)
def test_the_noise_levels_fall_from_sigma_max_to_sigma_min(discretization):
    sigma = sigma_steps(12, discretization, 0.05, 7.0)
    close(sigma[[0, -1]], [7.0, 0.05], rtol=0.2 if discretization == "iddpm" else 1e-9)
    assert (sigma.diff() < 0).all()


def test_a_range_of_iddpm_levels_includes_its_ends():
    u = iddpm_levels().tolist()
    close(sigma_steps(2, "iddpm", u[500], u[499]), [u[499], u[500]])
    with pytest.raises(ValueError, match="no two"):
        sigma_steps(2, "iddpm", u[500] * 0.9999, u[500] * 1.0001)
    with pytest.raises(ValueError, match="no two"):
        sigma_steps(2, "iddpm", u[500] * 1.0001, u[499] * 0.9999)


def test_the_defaults_are_the_papers():
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}
    assert defaults(EDM).items() >= dict(sigma_data=0.5, P_mean=-1.2, P_std=1.2, precond="edm").items()
    assert defaults(ode_sample).items() >= dict(steps=18, solver="heun", rho=7.0, alpha=1.0, S_churn=0.0, S_tmin=0.0, S_tmax=math.inf, S_noise=1.0).items()


def test_a_checkpoint_holds_what_was_learned_and_nothing_else():
    assert not silent().state_dict()


# The sampler

@pytest.mark.parametrize("key", golden("edm_sampler")["deterministic"])
def test_the_deterministic_sampler_gives_the_authors_numbers(key):
    D, N, *rho = key.split("|")
    seen = []
    def counted(x, sigma, y=None):
        seen.append(sigma)
        return dict(gauss=gauss, mix=mix)[D](x, sigma)
    expected = golden("edm_sampler")["deterministic"][key]
    x = last(ode_sample(counted, latent, steps=int(N[2:]), **{"rho": float(rho[0][4:])} if rho else {}))
    close(x, expected["x"], atol=1e-12)
    assert len(seen) == expected.get("nfe", len(seen)) and seen[0].shape == (2, 1, 1, 1)


@pytest.mark.parametrize("key", golden("edm_ablation")["outputs"])
def test_every_choice_of_sampler_gives_the_authors_numbers(key):
    _, solver, discretization, schedule, scaling = key.split("|")
    count = []
    x = last(ode_sample(lambda *a: count.append(0) or gauss(*a), latent, solver=solver, discretization=discretization, schedule=schedule, scaling=scaling))
    expected = golden("edm_ablation")["outputs"][key]
    close(x.flatten(), expected["x"], atol=1e-6, rtol=1e-6)
    assert len(count) == expected["nfe"]


def test_the_stochastic_sampler_gives_the_authors_numbers():
    case = golden("edm_stochastic")
    expected = case["outputs"]["edm_sampler|cifar_vp_pretrained|gauss"]
    S, tape, seen = case["inputs"]["settings"]["cifar_vp_pretrained"], [tensor(n) for n in case["inputs"]["noise_tape"]], []
    x = last(ode_sample(lambda x, sigma, y: seen.append(sigma[0].item()) or gauss(x, sigma), latent, S_churn=S["S_churn"], S_tmin=S["S_min"],
                        S_tmax=S["S_max"], S_noise=S["S_noise"], randn_like=lambda x: tape.pop(0)))
    close(x, expected["x"], atol=1e-12)
    close(seen, expected["sigmas_evaluated"])
    assert not tape  # one draw a step, used or not


@pytest.mark.parametrize("options, order", [
    (dict(solver="euler"), 1), (dict(), 2), (dict(alpha=0.5), 2), (dict(alpha=2 / 3), 2), (dict(alpha=1.1), 2),
    (dict(schedule="vp", scaling="vp"), 2), (dict(schedule="ve", discretization="ve"), 2), (dict(scaling="vp", discretization="vp"), 2)])
def test_the_error_falls_as_this_power_of_the_step(options, order):
    data, noise = Gaussian(0.3, 0.5), torch.randn(64, 1, 1, 1).double()
    def error(steps):  # at sigma_min, before the last step, which is always Euler's
        seen = [x for x, _ in ode_sample(optimal(data), noise, steps=steps, **options, sigma_min=0.05, sigma_max=80.0)]
        s = 1 / (1 + 0.05 ** 2) ** 0.5 if options.get("scaling") == "vp" else 1
        exact = data.mu + (80 * noise - data.mu) * ((data.s ** 2 + 0.05 ** 2) / (data.s ** 2 + 80 ** 2)) ** 0.5
        return (seen[-2] / s - exact).abs().max()
    ratio = error(129) / error(257)
    assert 2 ** order * 0.85 < ratio < 2 ** (order + 1)  # Ralston's comes near 8 on this linear equation


def test_churn_leaves_the_distribution_alone():
    data, B = Gaussian(0.3, 0.5), 20_000
    x = last(ode_sample(optimal(data), torch.randn(B, 1, 1, 1), steps=64, S_churn=40.0))
    assert abs(x.mean() - 0.3) < 5 * 0.5 / math.sqrt(B) and abs(x.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * B) + 0.005
    assert x.dtype == torch.float32


def test_churn_works_under_every_schedule_and_scaling():
    data, B = Gaussian(0.3, 0.5), 20_000
    for options in (dict(schedule="vp", scaling="vp"), dict(schedule="ve"), dict(scaling="vp")):
        x = last(ode_sample(optimal(data), torch.randn(B, 1, 1, 1), steps=64, S_churn=20.0, **options))
        assert abs(x.mean() - 0.3) < 5 * 0.5 / math.sqrt(B) + 0.005 and abs(x.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * B) + 0.01


def test_a_little_churn_raises_each_noise_level_by_its_share():  # Algorithm 2, lines 3 and 5
    seen = []
    last(ode_sample(lambda x, sigma, y=None: seen.append(sigma[0].item()) or gauss(x, sigma), torch.zeros(1, 1, 1, 1).double(), steps=5, solver="euler", S_churn=0.5))
    close(seen, 1.1 * sigma_steps(5))


def test_churn_acts_from_S_tmin_to_S_tmax_only():
    noise, data = torch.randn(4, 1, 1, 1), Gaussian()
    still = last(ode_sample(optimal(data), noise))
    close(last(ode_sample(optimal(data), noise, S_churn=40.0, S_tmin=81.0)), still)
    close(last(ode_sample(optimal(data), noise, S_churn=40.0, S_tmax=0.001)), still)
    only = sigma_steps(18)[3].item()                                           # both ends included
    assert (last(ode_sample(optimal(data), noise, S_churn=40.0, S_tmin=only, S_tmax=only)) - still).abs().max() > 1e-4


def test_S_noise_inflates_the_fresh_noise():
    B = 20_000
    def spread(S_noise):
        return last(ode_sample(optimal(Gaussian(0.3, 0.5)), torch.randn(B, 1, 1, 1), S_churn=20.0, S_noise=S_noise)).std()
    assert spread(1.1) > spread(1.0) + 10 * 0.5 / math.sqrt(2 * B)


def test_labels_reach_the_denoiser():
    seen = []
    last(ode_sample(lambda x, sigma, y: seen.append(y) or x, torch.zeros(2, 1, 1, 1), tensor([3, 4], torch.long), steps=2))
    assert len(seen) == 3 and all(y.tolist() == [3, 4] for y in seen)


@pytest.mark.parametrize("options, word", [
    (dict(steps=1), "steps"), (dict(sigma_min=3.0, sigma_max=2.0), "sigma_min"), (dict(sigma_min=0.0), "sigma_min"), (dict(S_churn=-1.0), "S_churn"),
    (dict(alpha=0.0), "alpha"), (dict(alpha=-1.0), "alpha"), (dict(alpha=1.6), "alpha"), (dict(alpha=2.0, steps=2, sigma_min=1.0, sigma_max=2.0, rho=1.0), "alpha"),
    (dict(alpha=1.3, S_churn=100.0), "alpha"), (dict(alpha=1.3, schedule="vp"), "alpha"), (dict(alpha=2.0, steps=2, schedule="vp"), "alpha"), (dict(rho=0.0), "rho"), (dict(S_noise=-1.0), "S_noise"),
    (dict(solver="rk4"), "solver"), (dict(discretization="x"), "discretization"), (dict(schedule="x"), "schedule"), (dict(scaling="ve"), "scaling")])
def test_options_that_cannot_be_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        list(ode_sample(gauss, latent, **options))


def test_an_unknown_column_of_table_1_is_refused():
    for part in ("precond", "p_train", "weight"):
        with pytest.raises(ValueError, match="edm, vp, ve, iddpm"):
            silent(**{part: "ddim"})


# Inversion

def test_inverting_and_sampling_gives_the_image_back():
    x = 0.3 + 0.4 * torch.randn(8, 1, 1, 1).double()
    z = ode_invert(optimal(Gaussian(0.3, 0.4)), x, steps=200)
    close(last(ode_sample(optimal(Gaussian(0.3, 0.4)), z, steps=200, rho=3)), x, atol=1e-3)
    close(z * 80, 0.3 + (x - 0.3) * ((0.4 ** 2 + 80 ** 2) / (0.4 ** 2 + 0.002 ** 2)) ** 0.5, rtol=0, atol=0.01 * 80)
    assert abs(z.std() - x.std() / 0.4) < 0.01
    types = set()
    ode_invert(lambda x, sigma, y=None: types.add(x.dtype) or gauss(x, sigma), x.float(), steps=3)
    assert types == {torch.float64}


# Augmentation: Table 6

def ramps(H=24, W=32):  # images whose pixels are their own coordinates about the centre
    x, y = torch.arange(W) - (W - 1) / 2, torch.arange(H) - (H - 1) / 2
    return torch.stack([x.expand(H, W), y[:, None].expand(H, W)]).float()


def test_at_probability_0_images_are_only_mirrored_half_the_time():
    x = torch.randn(400, 1, 4, 6)
    warped, labels = augment(x, 0.0)
    mirrored = labels[:, 0] == 1
    assert labels.shape == (400, 9) and (labels[:, 1:] == 0).all() and 150 < mirrored.sum() < 250
    close(warped, torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x), atol=1e-5)


def test_the_labels_tell_exactly_where_each_pixel_came_from():
    H, W, B = 24, 32, 64
    warped, labels = augment(ramps().expand(B, 2, H, W), 1.0)
    p = ramps().flatten(1).double()                                    # (2, H W)
    checked, signs = 0, []
    def turn(cos, sin):
        return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    for image, (a0, a1, a2, c, s, u, v, a6, a7) in zip(warped.double(), labels.double()):
        a5, misfit = (u ** 2 + v ** 2).sqrt(), []
        for sign in (1, -1):                                           # (a5, a4) and (-a5, a4 + pi) have the same labels in the paper
            axis, stretch = turn(u / a5, v / a5), torch.stack([2 ** (0.2 * sign * a5), 2 ** (-0.2 * sign * a5)])
            forward = torch.diag(torch.stack([1 - 2 * a0, 1 - 2 * a1])) * 2 ** (0.2 * a2)
            forward = axis @ torch.diag(stretch) @ axis.T @ turn(c + 1, -s) @ forward
            source = torch.linalg.solve(forward, p - torch.stack([a6 * W / 8, a7 * H / 8])[:, None])
            inside = (source[0].abs() < W / 2 - 1) & (source[1].abs() < H / 2 - 1)
            misfit.append((image.flatten(1) - source)[:, inside].abs().max())
        assert min(misfit) < 1e-3 < max(misfit)
        signs.append((1 if misfit[0] < misfit[1] else -1) * (1 if v > 0 else -1))
        checked += inside.sum()
    assert checked > 0.3 * B * H * W
    assert abs(sum(signs)) < 5 * B ** 0.5                              # each label belongs as often to a stretch as to a squeeze


def test_each_transform_has_its_share_and_its_spread():
    labels = augment(torch.zeros(20_000, 1, 1, 1), 0.3)[1]
    def share(values, p):
        assert abs((values != 0).float().mean() - p) < 5 * (p * (1 - p) / 20_000) ** 0.5
    for k, p in ((0, 0.5), (1, 0.15), (2, 0.3), (4, 0.3), (5, 0.3), (7, 0.3)):
        share(labels[:, k], p)
    assert ((labels[:, 7] != 0) == (labels[:, 8] != 0)).all()
    moved = labels[labels[:, 7] != 0]
    assert abs((moved[:, 7] * moved[:, 8]).mean()) < 5 / len(moved) ** 0.5
    assert abs((moved[:, 1] != 0).float().mean() - 0.15) < 5 * (0.15 * 0.85 / len(moved)) ** 0.5     # one has nothing to do with the other
    for k, std in ((2, 1.0), (7, 1.0), (8, 1.0), (4, 0.5 ** 0.5), (5, 0.5 ** 0.5), (6, 0.5 ** 0.5)):
        on = labels[:, k][labels[:, k] != 0]
        assert abs(on.std() - std) < 0.06 and abs(on.mean()) < 0.08


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_no_transform_has_to_do_with_another_and_every_angle_is_as_likely(p):
    B = 20_000
    a0, a1, a2, c, s, u, v, a6, a7 = augment(torch.zeros(B, 1, 1, 1), p)[1].double().unbind(1)
    turned, stretched = torch.atan2(s, c + 1), torch.atan2(v, u)
    for angle, on in ((turned, s != 0), (stretched, u != 0)):
        angle = angle[on].sort()[0] / (2 * math.pi) + 0.5
        assert (angle - torch.linspace(0, 1, len(angle)).double()).abs().max() < 2 / len(angle) ** 0.5  # Kolmogorov-Smirnov
    size = u ** 2 + v ** 2
    columns = [a0, a1, a2, a2 ** 2, a2 != 0, c, s, (2 * turned).cos(), (2 * turned).sin(), s != 0, u, v, size, (2 * stretched).cos(), (2 * stretched).sin(), size != 0, a6, a7, a6 ** 2, a7 ** 2, a6 != 0]
    groups = torch.tensor([0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 6, 5, 6, 5])
    data = torch.stack([column.double() for column in columns])
    data = data - data.mean(1, keepdim=True)
    data = data / data.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    apart = groups[:, None] != groups
    apart &= ~((groups[:, None] >= 5) & (groups >= 5)) | (p == 1)                # a_6 and a_7 are switched on together
    assert ((data @ data.T / B).abs() * apart).max() < 6 / B ** 0.5


def test_the_network_is_told_what_was_done_in_training_and_nothing_in_sampling():
    asked, seen = [], []
    def make_net(c_in, c_out):
        asked.append((c_in, c_out))
        return closed_form(lambda x, c, y: seen.append(x) or x[:, :2])(c_in, c_out)
    model = EDM(make_net, 2, augment=1.0)
    model.loss(torch.randn(16, 2, 8, 8))
    planes = seen.pop()[:, 2:]
    assert asked == [(11, 2)] and planes.shape == (16, 9, 8, 8) and (planes == planes[:, :, :1, :1]).all() and planes.flatten(1).std(1).min() > 0.1
    last(model.sample(torch.randn(4, 2, 8, 8), steps=2))
    assert all((x[:, 2:] == 0).all() and x.shape[1] == 11 for x in seen)


@pytest.mark.parametrize("given, expected", [({}, (10.0, 0.1)), (dict(sigma_min=0.5, sigma_max=5.0), (5.0, 0.5)), (dict(sigma_min=0.01, sigma_max=50.0), (10.0, 0.1))])
def test_the_range_is_narrowed_to_what_the_network_knows(given, expected):
    class D:
        sigma_min, sigma_max, seen = 0.1, 10.0, []
        def __call__(self, x, sigma, y=None):
            self.seen.append(sigma.max().item())
            return 0 * x
    for run in (lambda: last(ode_sample(D(), torch.ones(1, 1, 1, 1), steps=5, **given)), lambda: ode_invert(D(), torch.ones(1, 1, 1, 1), steps=5, **given)):
        D.seen = []
        run()
        close([max(D.seen), min(D.seen)], expected, rtol=1e-6)
