"""Does bfloat16 cost anything that can be seen?   python experiments/tools/precision.py

Trains the same run, same seeds and same images, in fp32 and in bf16; how far seeds differ says
how much is chance. Writes the losses along the way, the error by noise level, the Frechet
distance and a grid. Slow where the hardware does not multiply in bfloat16.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.common import Setup, check_counts, choose, prepare
from experiments.judge import measure
from experiments.report import claim, curves_of, plot, read_table, write, write_results
from experiments.verdict import decide
from plumbing.flags import run, script

CASES = ("fp32", "bf16")


def precision(
    *,
    quick: bool = False,  # 16x16 images, a small network and 600 steps, for emulated bf16
    method: str = "pdm",  # as in train.py
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 6,000, quick 600
    n: int = 256,  # samples for the Frechet distance and the grid
    seeds: int = 2,  # trainings of each, two or more
    chain: int = 50,  # sampling steps
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    out: str = "runs/precision",  # folder of the runs, precision.csv, losses.csv and the grid
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the tables. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 600, 6000)
    every = max(1, steps // 20)
    small = "--width 32 --patch 2" if quick and method == "pdm" else ""
    words = f"{small} --every {every} {flags}"
    setup = Setup(Path(out), data, size, steps, n, features, device, words, seeds)
    check_counts(1, chain=chain)
    check_counts(2, seeds=seeds)
    prepare(setup)
    results = []
    losses = []
    for name in CASES:
        results.append(measure(setup, name, f"--method {method} --precision {name}", chain))
        for k, path in enumerate(results[-1].paths):
            for row in read_table(path.parent / "log.csv"):
                point = dict(step=int(row["step"]), loss=float(row["loss"]))
                losses.append(dict(run=f"{name}, seed {k}") | point)

    rows = [dict(precision=name) for name in CASES]
    note = f"{method}, {data}, {steps} steps of 32 images, {n} samples in {chain} steps"
    write_results(setup.out / "precision.csv", rows, results, note)
    write(setup.out / "losses.csv", losses, "the mean loss since the row before")
    curves = curves_of(losses, "run", "step", "loss")
    plot(setup.out / "losses.png", curves, "step", "loss", log="")
    of_run = {curve.name: curve.y for curve in curves}
    of_bf16 = apart(of_run["fp32, seed 0"], of_run["bf16, seed 0"])
    chance = apart(of_run["fp32, seed 0"], of_run["fp32, seed 1"])
    distances = [f"{name} {result.drawn.frechet}" for name, result in zip(CASES, results)]
    ours = f"losses {of_bf16:.2%} apart, those of two seeds {chance:.2%}"
    fp32, bf16 = (result.drawn.distances for result in results)
    ours = f"{ours}; Frechet {', '.join(distances)}"
    claim("fp32 draws better than bf16", "", ours, decide(fp32, bf16))


def apart(losses, others):
    """The mean relative difference of two runs' losses."""
    return statistics.mean(abs(a - b) / a for a, b in zip(losses, others))


main = script(precision, __doc__)

if __name__ == "__main__":
    run(main)
