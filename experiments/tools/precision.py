"""Does bfloat16 cost anything that can be seen?   python experiments/tools/precision.py

Trains the same run, same seed and same images, in fp32 and in bf16, and once more in fp32 with
another seed, which says how much is chance. Writes the losses along the way, the error by noise
level, the Frechet distance and a grid. Slow where the hardware does not multiply in bfloat16.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.common import Setup, check_counts, choose, prepare
from experiments.judge import measure
from experiments.report import claim, curves_of, plot, read_table, write, write_results
from plumbing.flags import run, script

CASES = {
    "fp32": "--precision fp32",
    "bf16": "--precision bf16",
    "fp32, another seed": "--precision fp32 --seed 1",
}


def precision(
    *,
    quick: bool = False,  # 16x16 images, a small network and 600 steps, for emulated bf16
    method: str = "pdm",  # as in train.py
    flags: str = "",  # more of train.py's flags, in quotes
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 6,000, quick 600
    n: int = 256,  # samples for the Frechet distance and the grid
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
    setup = Setup(Path(out), data, size, steps, n, features, device, words)
    check_counts(1, chain=chain)
    prepare(setup)
    results = []
    losses = []
    for name, of_case in CASES.items():
        folder = name.replace(", ", "-").replace(" ", "-")
        results.append(measure(setup, folder, f"--method {method} {of_case}", chain))
        for row in read_table(setup.out / folder / "log.csv"):
            loss = float(row["loss"])
            losses.append(dict(precision=name, step=int(row["step"]), loss=loss))

    rows = [dict(precision=name) for name in CASES]
    note = f"{method}, {data}, {steps} steps of 32 images, {n} samples in {chain} steps"
    write_results(setup.out / "precision.csv", rows, results, note)
    write(setup.out / "losses.csv", losses, "the mean loss since the row before")
    curves = curves_of(losses, "precision", "step", "loss")
    plot(setup.out / "losses.png", curves, "step", "loss", log="")
    fp32, bf16, other_seed = (curve.y for curve in curves)
    chance = f"those of two seeds {apart(fp32, other_seed):.2%}"
    distances = [f"{name} {result.drawn.frechet}" for name, result in zip(CASES, results)]
    ours = f"losses {apart(fp32, bf16):.2%} apart, {chance}; Frechet {', '.join(distances)}"
    claim("bf16 costs nothing that can be seen", "", ours)


def apart(losses, others):
    """The mean relative difference of two runs' losses."""
    return statistics.mean(abs(a - b) / a for a, b in zip(losses, others))


main = script(precision, __doc__)

if __name__ == "__main__":
    run(main)
