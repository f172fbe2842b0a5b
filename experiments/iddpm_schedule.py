"""Improved DDPM's claims on schedule, variance and objective (Figs. 1, 2, 3 and 5, Table 2).   python experiments/iddpm_schedule.py --quick

Fig. 1: beta_tilde / beta against t for three T: the choice of the variance matters in the first steps only. Fig. 3 and 5: an image and alpha_bar under the
linear and the cosine schedule. Then trains the four cases of Table 2 alike and measures bits/dim, and how much of the bound lies in which steps (Fig. 2).
"""
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
from ddpm import linear_betas
from evaluate import evaluate, table
from iddpm import IDDPM, cosine_betas
from common import claim, plot, run_once, three_levels, write
from train import command, script

CASES = [("linear", "simple"), ("cosine", "simple"), ("cosine", "hybrid"), ("cosine", "vlb")]


def iddpm_schedule(*,
                   quick: bool = False,        # 16x16, T = 250, 1,000 steps and 64 test images, for two CPU cores
                   data: str = "digits",       # or what train.py's --data takes
                   size: int | None = None,    # image size; default 32, quick 16
                   test: str | None = None,    # images to measure; default those held out
                   T: int | None = None,       # diffusion steps; default 4000, quick 250
                   steps: int | None = None,   # training steps; default 25,000, quick 1,000
                   n: int | None = None,       # images to measure; default 128, quick 64
                   train_runs: bool = True,    # --no-train_runs: the figures that need no network
                   out: str = "runs/iddpm-schedule",  # folder of runs, tables and pictures
                   device: str | None = None): # cuda, mps or cpu
    """Figures first, then Table 2. A run that is there already is used as it is."""
    out, T, steps, n = Path(out), T or (250 if quick else 4000), steps or (1000 if quick else 25_000), n or (64 if quick else 128)
    size = size or (16 if quick else 32)
    stem = f"{Path(data).stem}-{size}"
    out.mkdir(parents=True, exist_ok=True)
    table(out / "fig1.csv", [dict(T=k, t_of_T=round(t / k, 4), ratio=f"{ratio:.6g}") for k in (100, 1000, 4000) for t, ratio in variance_ratio(k)])
    table(out / "fig5.csv", [dict(t_of_T=t / 1000, linear=f"{a:.6g}", cosine=f"{b:.6g}") for t, a, b in zip(range(1, 1001), *(alpha_bar(k) for k in ("linear", "cosine")))])
    images, _, _ = pixels.load(data, (size,))
    x, eps = pixels.to_float(images[:1]), torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    rows = [alpha_bar(name)[torch.linspace(0, 999, 8).long()].float().view(8, 1, 1, 1) for name in ("linear", "cosine")]
    pixels.save_grid(torch.cat([a.sqrt() * x + (1 - a).sqrt() * eps for a in rows]), out / "fig3.png", 8, ["linear", "cosine"])
    plot(out / "fig1.png", [{"T": f"T = {k}", "t / T": t / k, "beta_tilde / beta": ratio} for k in (100, 1000, 4000) for t, ratio in variance_ratio(k)],
         "t / T", "beta_tilde / beta", "T", log="")
    plot(out / "fig5.png", [{"schedule": k, "t / T": t / 1000, "alpha_bar": a.item()} for k in ("linear", "cosine") for t, a in enumerate(alpha_bar(k), 1)],
         "t / T", "alpha_bar", "schedule", log="")
    if not train_runs:
        return
    rows, shares = [], []
    for schedule, objective in CASES:
        run = out / f"{stem}-{schedule}-{objective}"
        run_once(run, f"--size {size} --method iddpm {three_levels(size)} --schedule {schedule} --objective {objective} --T {T}", data, steps, device)
        found = evaluate(run / "ckpt.pt", {}, nll=True, n=n, data=test, device=device)["nll"]
        terms = list(csv.DictReader(open(run / "evaluation" / "terms.csv")))
        shares += [{"case": f"{schedule}, {objective}", "t": int(term["t"]), "bits/dim": float(term["bits_per_dim"])} for term in terms]
        first = sum(float(term["bits_per_dim"]) for term in terms[:max(1, T // 50)])
        rows.append(dict(schedule=schedule, objective=objective, bits_per_dim=round(found["bits_per_dim"], 3), error=found["standard_error"] and round(found["standard_error"], 3),
                         L_0=round(found["decoder"], 3), share_of_first_fiftieth=round(first / found["bits_per_dim"], 3)))
    write(out / f"table2-{stem}.csv", rows, f"{data}, T = {T}, {steps} steps, {n} images; {len(rows)} runs")
    table(out / f"fig2-{stem}.csv", shares)
    plot(out / f"fig2-{stem}.png", shares, "t", "bits/dim", "case", log="xy")
    claim("the cosine schedule and the hybrid objective code better (Improved DDPM, Table 2)", "3.37, 3.26, 3.17, 2.94 bits/dim", ", ".join(f"{line['bits_per_dim']}" for line in rows))


def variance_ratio(T):
    """[(t, beta_tilde_t / beta_t), ...] of the linear schedule, t = 2..T."""
    method = IDDPM(lambda i, o: None, 1, T=T, schedule="linear", objective="simple")
    t = torch.arange(2, T + 1)
    return list(zip(t.tolist(), (method.beta_tilde(t, t - 1) / method.beta(t, t - 1)).tolist()))


def alpha_bar(name, T=1000):
    return (1 - (linear_betas(T) if name == "linear" else cosine_betas(T))).cumprod(0)


main = script(iddpm_schedule, __doc__)

if __name__ == "__main__":
    command(main)
