"""The numbers that a page shows of a step are those with which the sampler takes it."""
import functools
import math
import re

import pytest
import torch
from conftest import Gaussian, closed_form, linear_alpha_bar, tensor

from ddpm import DDPM
from edm import denoiser, ode_sample
from plumbing.drawing import from_noise
from plumbing.steps import as_html, numbers_of

T = 30
DATA = Gaussian()


class KnownLevels:
    """DATA's denoiser, which says of itself what `denoiser` asks of a method."""

    D = DATA.D
    sigma_min = 0.01
    sigma_max = 50.0

    def round_sigma(self, sigma):
        return sigma


def ddpm(**flags):
    alpha_bar = linear_alpha_bar(T)
    net = closed_form(lambda x, t, y: DATA.eps(x, alpha_bar[t.long()]))
    return DDPM(net, 1, T=T, clip=False, **flags)


def walk(run, randn_like):
    """The states of a chain, (N + 1, 1), its estimates and its noise draws."""
    noise = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    pairs = list(from_noise(run)(noise, randn_like=randn_like))
    x = torch.cat([x.flatten() for x, _ in pairs])
    x_0_hat = torch.cat([x_0_hat.flatten() for _, x_0_hat in pairs])
    return x, x_0_hat


def column(numbers, symbol):
    """The one column whose words begin with this symbol."""
    columns = {re.split("[ ,]", words)[0]: column for words, column in numbers.columns.items()}
    assert len(columns) == len(numbers.columns)
    return columns[symbol]


def assert_close(came, expected):
    torch.testing.assert_close(came.double(), expected.double(), rtol=1e-9, atol=1e-12)


# A chain of steps t


def test_a_chain_s_levels_are_those_of_its_kept_steps():
    run = functools.partial(ddpm().sample, steps=4)
    numbers = numbers_of(ddpm(), run, 4)
    t = [30, 20, 11, 1, 0]
    alpha_bar = linear_alpha_bar(T)[t]
    assert column(numbers, "t").tolist() == t
    assert column(numbers, "s").tolist() == t[1:]
    assert_close(column(numbers, "alpha_bar_t"), alpha_bar)
    assert_close(column(numbers, "sigma"), ((1 - alpha_bar) / alpha_bar).sqrt())
    assert_close(numbers.curve, alpha_bar)


def test_the_weights_of_x_0_and_x_t_are_those_of_eq_7():
    numbers = numbers_of(ddpm(), functools.partial(ddpm().sample, steps=4), 4)
    alpha_bar = linear_alpha_bar(T)[[30, 20, 11, 1, 0]]
    for k in range(4):
        here, there = alpha_bar[k], alpha_bar[k + 1]
        beta = 1 - here / there
        assert_close(column(numbers, "alpha_t")[k], 1 - beta)
        assert_close(column(numbers, "a")[k], there.sqrt() * beta / (1 - here))
        assert_close(column(numbers, "b")[k], (1 - beta).sqrt() * (1 - there) / (1 - here))


@pytest.mark.parametrize("steps", [None, 1, 5])
def test_the_ancestral_sampler_takes_its_steps_by_these_weights(steps):
    run = functools.partial(ddpm().sample, steps=steps)
    x, x_0_hat = walk(run, torch.zeros_like)
    numbers = numbers_of(ddpm(), run, len(x) - 1)
    a, b = column(numbers, "a"), column(numbers, "b")
    assert len(a) == (steps or T)
    assert_close(x[1:], a * x_0_hat[:-1] + b * x[:-1])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_takes_its_steps_by_these_weights(eta):
    run = functools.partial(ddpm().sample, steps=6, eta=eta)
    x, x_0_hat = walk(run, torch.ones_like)
    numbers = numbers_of(ddpm(), run, 6)
    alpha_bar = column(numbers, "alpha_bar_t")[:-1]
    eps = (x[:-1] - alpha_bar.sqrt() * x_0_hat[:-1]) / (1 - alpha_bar).sqrt()
    a, b, c = (column(numbers, name) for name in ("a", "b", "c"))
    assert_close(x[1:], a * x_0_hat[:-1] + b * eps + c)
    assert (c[:-1] > 0).all() == (eta > 0)


# A solver's levels


def eq_5(N, low, high, rho):
    """EDM Eq. 5, and the final 0."""
    low = low ** (1 / rho)
    high = high ** (1 / rho)
    return tensor([(high + i / (N - 1) * (low - high)) ** rho for i in range(N)] + [0])


def solve(noise=0.0, **options):
    """(Numbers, x, D) of 8 steps; x (9,) from the first level on, D (9,) of each churned x."""
    method = KnownLevels()
    run = functools.partial(ode_sample, denoiser(method), steps=8, **options)
    x, denoised = walk(run, functools.partial(torch.full_like, fill_value=noise))
    numbers = numbers_of(method, run, 8)
    x[0] *= 50
    return numbers, x, denoised


def churned(numbers, x, noise):
    """The states x after churn, and the level of each."""
    sigma = column(numbers, "sigma_i")[:-1]
    sigma_hat = column(numbers, "sigma_hat_i")
    return x[:-1] + (sigma_hat**2 - sigma**2).sqrt() * noise, sigma_hat


def test_a_solver_s_levels_are_those_of_eq_5():
    numbers, _, _ = solve(rho=5.0)
    sigma = eq_5(8, 0.01, 50.0, rho=5)
    assert_close(column(numbers, "sigma_i"), sigma)
    assert_close(column(numbers, "sigma_i+1"), sigma[1:])
    assert_close(column(numbers, "sigma_hat_i"), sigma[:-1])
    assert_close(numbers.curve[:-1], sigma[:-1].log())


def test_churn_raises_the_levels_between_its_ends_and_no_others():
    numbers, _, _ = solve(S_churn=2.0, S_tmin=0.1, S_tmax=20.0)
    sigma = eq_5(8, 0.01, 50.0, rho=7)[:-1]
    between = (0.1 <= sigma) & (sigma <= 20)
    assert 0 < between.sum() < 8
    assert_close(column(numbers, "sigma_hat_i"), torch.where(between, 1.25 * sigma, sigma))
    numbers, _, _ = solve(S_churn=100.0)
    assert_close(column(numbers, "sigma_hat_i"), math.sqrt(2) * sigma)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_euler_mixes_x_and_its_estimate_by_r(churn):
    numbers, x, D = solve(noise=1.0, solver="euler", S_churn=churn)
    x_hat, _ = churned(numbers, x, 1.0)
    r = column(numbers, "r")
    assert_close(column(numbers, "1"), 1 - r)
    assert_close(x[1:], r * x_hat + (1 - r) * D[:-1])
    assert "a = " not in "".join(numbers.columns)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_heun_mixes_x_and_both_estimates_by_r_a_and_b(churn):
    numbers, x, D = solve(noise=1.0, S_churn=churn)
    x_hat, _ = churned(numbers, x, 1.0)
    r, a, b = (column(numbers, name) for name in "rab")
    x_prime = r * x_hat + (1 - r) * D[:-1]
    D_prime = DATA.D(x_prime, column(numbers, "sigma_i+1"))
    assert_close(x[1:-1], (r * x_hat)[:-1] + a * D[:-2] + b * D_prime[:-1])
    assert_close(x[-1], x_prime[-1])  # the last step is Euler's
    assert_close(a + b, 1 - r[:-1])


@pytest.mark.parametrize(
    "options",
    [dict(schedule="vp"), dict(schedule="vp", scaling="vp"), dict(alpha=0.5)],
)
def test_of_other_schedules_and_solvers_the_levels_alone_are_known(options):
    numbers, _, _ = solve(**options)
    assert list(numbers.columns) == ["i", "sigma_i", "sigma_hat_i, with churn", "sigma_i+1"]
    assert numbers.formula == ""


# What each method has


def test_a_method_on_steps_is_known_by_its_levels_under_a_solver():
    run = functools.partial(ode_sample, denoiser(ddpm()), steps=5)
    numbers = numbers_of(ddpm(), run, 5)
    alpha_bar = linear_alpha_bar(T)[1:]
    known = ((1 - alpha_bar) / alpha_bar).sqrt()
    for sigma in column(numbers, "sigma_i")[:-1]:
        assert (known - sigma).abs().min() < 1e-9


def test_of_a_sampler_that_tells_nothing_the_steps_are_counted():
    def sample(noise, y=None, *, steps=3, randn_like=torch.randn_like):
        yield noise, noise

    numbers = numbers_of(object(), sample, 3)
    assert list(numbers.columns) == ["step"]
    assert column(numbers, "step").tolist() == [0, 1, 2, 3]


def test_numbers_that_are_not_of_the_steps_taken_are_not_shown():
    numbers = numbers_of(ddpm(), functools.partial(ddpm().sample, steps=4), 5)
    assert list(numbers.columns) == ["step"]


@pytest.mark.parametrize(
    "formula, html",
    [
        ("x_i+1 = r x_hat_i", "x<sub>i+1</sub> = r x\u0302<sub>i</sub>"),
        ("sqrt(alpha_bar_s - c^2)", "\u221a(\u03b1\u0304<sub>s</sub> \u2212 c\u00b2)"),
        ("alpha_t, sigma_hat_i", "\u03b1<sub>t</sub>, \u03c3\u0302<sub>i</sub>"),
        ("D(x'; sigma_i+1)", "D(x\u2032; \u03c3<sub>i+1</sub>)"),
    ],
)
def test_a_formula_has_its_letters_and_subscripts(formula, html):
    assert as_html(formula) == html
