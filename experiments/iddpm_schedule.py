"""Improved DDPM's claims on schedule, variance and objective (Figs. 1, 2, 3 and 5, Table 2).

    python experiments/iddpm_schedule.py --quick

Fig. 1: beta_tilde / beta against t for three T: the choice of the variance matters in the first
steps only. Figs. 3 and 5: an image and alpha_bar under the linear and the cosine schedule. Then
trains the four cases of Table 2 alike and measures bits/dim, and how much of the bound lies in
which steps (Fig. 2).
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import evaluate, write_table
from experiments.common import Setup, check_counts, choose, prepare, three_levels, train_each
from experiments.report import claim, curves_of, mean_and_spread, plot, read_table, write
from experiments.schedules import draw_figures
from experiments.verdict import decide
from plumbing.flags import run, script

# (schedule, objective)
CASES = [("linear", "simple"), ("cosine", "simple"), ("cosine", "hybrid"), ("cosine", "vlb")]


def iddpm_schedule(
    *,
    quick: bool = False,  # 16x16, T = 250, 1,000 steps and 64 test images, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    test: str | None = None,  # images to measure; default those held out
    T: int | None = None,  # diffusion steps; default 4000, quick 250
    steps: int | None = None,  # training steps; default 25,000, quick 1,000
    n: int | None = None,  # images to measure; default 128, quick 64
    train_runs: bool = True,  # --no-train_runs: the figures that need no network
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/iddpm-schedule",  # folder of runs, tables and pictures
    device: str | None = None,  # cuda, mps or cpu
):
    """Figures first, then Table 2. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    T = choose(T, quick, 250, 4000)
    steps = choose(steps, quick, 1000, 25_000)
    n = choose(n, quick, 64, 128)
    setup = Setup(Path(out), data, size, steps, n, "none", device, flags, seeds)
    check_counts(2, T=T)
    prepare(setup)
    draw_figures(setup.out, data, size)
    if not train_runs:
        return

    rows = []
    terms = []
    bits = []
    for schedule, objective in CASES:
        name = f"{setup.stem}-{schedule}-{objective}"
        words = f"--method iddpm {three_levels(size)} --T {T}"
        words = f"{words} --schedule {schedule} --objective {objective}"
        paths = train_each(setup, name, words)
        found = [evaluate(p, {}, nll=True, n=n, data=test, device=device)["nll"] for p in paths]
        bits.append([bound["bits_per_dim"] for bound in found])
        bits_of_t = read_table(paths[0].parent / "evaluation" / "terms.csv")
        case = dict(schedule=schedule, objective=objective)
        rows.append(case | columns(found, bits_of_t, T))
        for row in bits_of_t:
            point = {"t": int(row["t"]), "bits/dim": float(row["bits_per_dim"])}
            terms.append(dict(case=f"{schedule}, {objective}") | point)

    note = f"{data}, T = {T}, {steps} steps, {n} images; {seeds} trainings of each"
    write(setup.out / f"table2-{setup.stem}.csv", rows, note)
    figure = setup.out / f"fig2-{setup.stem}.csv"
    write_table(figure, terms)
    curves = curves_of(terms, "case", "t", "bits/dim")
    plot(figure.with_suffix(".png"), curves, "t", "bits/dim", log="xy")
    linear, cosine, hybrid, vlb = bits
    claim_order("the cosine schedule codes better", "3.37 and 3.26", cosine, linear)
    claim_order("the hybrid objective codes better", "3.26 and 3.17", hybrid, cosine)
    claim_order("L_vlb codes better than the hybrid", "3.17 and 2.94", vlb, hybrid)


def claim_order(text, paper, better, worse):
    ours = f"{statistics.mean(worse):.3f} and {statistics.mean(better):.3f} bits/dim"
    claim(f"{text} (Improved DDPM, Table 2)", paper, ours, decide(better, worse))


def columns(bounds, bits_of_t, T):
    """What the table says of the trainings' bounds, and of the first one's fiftieth."""
    first = sum(float(row["bits_per_dim"]) for row in bits_of_t[: max(1, T // 50)])
    share = round(first / bounds[0]["bits_per_dim"], 3)
    L_0 = round(statistics.mean(bound["decoder"] for bound in bounds), 3)
    bits = mean_and_spread("bits_per_dim", [bound["bits_per_dim"] for bound in bounds])
    return bits | dict(L_0=L_0, share_of_first_fiftieth=share)


main = script(iddpm_schedule, __doc__)

if __name__ == "__main__":
    run(main)
