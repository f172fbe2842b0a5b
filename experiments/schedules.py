"""The figures of Improved DDPM that need no network: its Figs. 1, 3 and 5."""
import torch

from ddpm import Chain, linear_betas
from evaluate import write_table
from experiments.report import curves_of, plot
from iddpm import cosine_betas
from plumbing import datasets, images

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def draw_figures(out, data, size):
    """fig1 and fig5, a table and a plot each, and fig3, an image of the data under noise."""
    ratios = [row for T in (100, 1000, 4000) for row in variance_ratios(T)]
    table_and_plot(out / "fig1.csv", ratios, "T", "t_of_T", "ratio", "beta_tilde / beta")
    levels = [row for name in SCHEDULES for row in noise_levels(name)]
    table_and_plot(out / "fig5.csv", levels, "schedule", "t_of_T", "alpha_bar", "alpha_bar")

    x, _, _ = datasets.load(data, (size, size))
    x = images.to_float(x[:1])                                          # (1, C, H, W)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for name in SCHEDULES:
        a = alpha_bar(name)[torch.linspace(1, 1000, 8).long()].float().view(8, 1, 1, 1)
        rows.append(a.sqrt() * x + (1 - a).sqrt() * eps)                # (8, C, H, W)
    images.save_grid(torch.cat(rows), out / "fig3.png", 8, list(SCHEDULES))


def table_and_plot(path, rows, group, x, y, words):
    write_table(path, rows)
    plot(path.with_suffix(".png"), curves_of(rows, group, x, y), "t / T", words, log="")


def alpha_bar(name, T=1000):
    """(T + 1,), 1 at t = 0."""
    betas = SCHEDULES[name](T)
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def variance_ratios(T):
    """Rows of beta_tilde_t / beta_t of the linear schedule, t = 2..T."""
    chain = Chain(alpha_bar("linear", T), range(1, T + 1))
    t = torch.arange(2, T + 1)
    ratios = (chain.beta_tilde(t, t - 1) / chain.beta(t, t - 1)).tolist()
    places = (t / T).tolist()
    return [row_of("T", T, place, "ratio", ratio) for place, ratio in zip(places, ratios)]


def noise_levels(name, T=1000):
    """Rows of alpha_bar_t under a schedule, t = 1..T."""
    values = enumerate(alpha_bar(name, T).tolist())
    rows = [row_of("schedule", name, t / T, "alpha_bar", value) for t, value in values]
    return rows[1:]


def row_of(group, name, place, column, value):
    return {group: name, "t_of_T": round(place, 4), column: float(f"{value:.6g}")}
