"""DDPM's claim: L_simple draws better images than the bound that it comes from, and codes
them worse (Table 2); and what the chain decides when (Figs. 5, 6).

    python experiments/ddpm_loss.py --quick

Trains eps with L_simple and with the bound itself (Eq. 5, one random term a step) alike; writes
bits/dim, Frechet distance and grids, rate and distortion along the chain (terms.csv,
rate_distortion.png; bits/dim and RMSE of 255) and a strip of progressive generation.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import evaluate
from experiments import report
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import measure
from experiments.verdict import decide
from plumbing import checkpoint
from plumbing.flags import run, script
from sample import sample

LOSSES = {"L_simple": "simple", "L, the bound": "bound"}


def ddpm_loss(
    *,
    quick: bool = False,  # 16x16, 2,000 steps, a bound over 250 and samples of 100; 2 CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 30,000, quick 2,000
    test: str | None = None,  # images for bits/dim; default those held out
    bound_n: int | None = None,  # how many of them; default 128, quick 16
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/ddpm-loss",  # folder of the runs and tables
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 2000, 30_000)
    n = choose(n, quick, 128, 2000)
    bound_n = choose(bound_n, quick, 16, 128)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    prepare(setup, bound_n=bound_n)

    rows = []
    results = []
    bits = []
    terms = []
    for loss, objective in LOSSES.items():
        name = f"{setup.stem}-{objective}"
        words = f"--method ddpm --objective {objective} {three_levels(size)}"
        result = measure(setup, name, words, choose(None, quick, 100, 1000))
        T = checkpoint.read(result.paths[0])["config"]["T"]
        of_bound = min(250, T) if quick else T
        paths = result.paths
        bits.append([bits_per_dim(path, of_bound, bound_n, test, device) for path in paths])
        rows.append(dict(loss=loss) | report.mean_and_spread("bits_per_dim", bits[-1]))
        results.append(result)
        for row in report.read_table(paths[0].parent / "evaluation" / "terms.csv"):
            terms.append({"loss": loss} | {k: float(row[k]) for k in ("rate", "distortion")})

    strip = str(setup.out / "progressive-strip.png")
    options = dict(steps=min(250, T))
    sample(results[0].paths[0], options, strip=True, n=4, out=strip, device=device)
    table = setup.out / f"ddpm_loss-{setup.stem}.csv"
    report.write_results(table, rows, results, f"{data}, {steps} steps")
    curves = report.curves_of(terms, "loss", "rate", "distortion")
    report.plot(setup.out / "rate_distortion.png", curves, "rate", "distortion", log="")
    simple, bound = (result.drawn for result in results)
    ours = f"Frechet {simple.frechet} and {bound.frechet}"
    verdict = decide(simple.distances, bound.distances)
    text = "L_simple draws better than the bound (DDPM, Table 2)"
    report.claim(text, "FID 3.17 and 13.51", ours, verdict)
    means = " and ".join(str(row["bits_per_dim"]) for row in rows)
    ours = f"{means} bits/dim on these {bound_n} images"
    verdict = decide(bits[1], bits[0])
    report.claim("the bound codes better (DDPM, Table 2)", "3.75 and 3.70", ours, verdict)


def bits_per_dim(path, steps, n, test, device):
    measured = evaluate(path, dict(steps=steps), nll=True, n=n, data=test, device=device)
    return measured["nll"]["bits_per_dim"]


main = script(ddpm_loss, __doc__)

if __name__ == "__main__":
    run(main)
