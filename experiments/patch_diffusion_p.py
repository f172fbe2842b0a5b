"""Patch Diffusion's claim: crops make training about twice as fast at no cost in quality, if
some steps see whole images.

    python experiments/patch_diffusion_p.py --quick

Trains p = 0, .1, .25, .5, .75 and 1 alike, p = .5 with progressive sizes too, and p = .5 and 1
on a small part of the data; writes the seconds of training, the error by noise level, the
Frechet distance and a grid for each. (Called patch_diffusion.py it would hide the paper's.)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare
from experiments.equal_time import seconds_of
from experiments.judge import measure
from experiments.report import claim, curves_of, plot, write_results
from experiments.verdict import decide
from plumbing.flags import run, script

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # p, of steps on whole images


def patch_diffusion_p(
    *,
    quick: bool = False,  # 16x16 and 600 steps of each, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 10,000, quick 600
    batch: int | None = None,  # whole images a step; default 256, to fill a GPU, quick 32
    small: int = 500,  # images of the small data set
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/patch-diffusion-p",  # folder of the runs and the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 600, 10_000)
    batch = choose(batch, quick, 32, 256)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    prepare(setup, batch=batch, small=small)

    rows = [dict(p=p, sizes="stochastic", images="all") for p in SHARES]
    rows.append(dict(p=0.5, sizes="progressive", images="all"))
    rows.append(dict(p=0.5, sizes="stochastic", images=small))
    rows.append(dict(p=1.0, sizes="stochastic", images=small))
    results = []
    seconds = []
    for row in rows:
        name = "{}-p{p}-{sizes}-{images}".format(setup.stem, **row)
        overfit = 0 if row["images"] == "all" else small
        words = "--method patch_diffusion --p_full {p} --sizes {sizes}".format(**row)
        words = f"{words} --overfit {overfit} --P_mean 0 --batch {batch}"
        results.append(measure(setup, name, words, 18))
        seconds.append(seconds_of(results[-1].paths))

    timed = [row | dict(seconds=s) for row, s in zip(rows, seconds)]
    note = f"{data}, {steps} steps, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"patch_diffusion_p-{setup.stem}.csv", timed, results, note)
    if results[0].drawn.distances:
        plot_shares(setup, rows, results)
    half = SHARES.index(0.5)
    one = SHARES.index(1.0)
    faster = seconds[one] / max(seconds[half], 0.1)
    text = "crops make training about twice as fast (Patch Diffusion)"
    claim(text, "2x", f"{faster:.2f}x for p = .5", "yes" if faster > 1 else "no")
    drawn, whole = results[half].drawn, results[one].drawn
    ours = f"Frechet {drawn.frechet} for p = .5, {whole.frechet} for p = 1"
    verdict = decide(whole.distances, drawn.distances)
    claim("whole images draw better at equal steps", "FID as good", ours, verdict)


def plot_shares(setup, rows, results):
    """The distance against p, a curve for each kind of sizes and amount of data."""
    points = []
    for row, result in zip(rows, results):
        trained_on = "{sizes}, {images} images".format(**row)
        points.append(dict(p=row["p"], on=trained_on) | result.drawn.columns())
    curves = curves_of(points, "on", "p", "frechet", "spread")
    plot(setup.out / f"shares-{setup.stem}.png", curves, "p", "frechet", log="")


main = script(patch_diffusion_p, __doc__)

if __name__ == "__main__":
    run(main)
