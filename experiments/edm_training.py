"""EDM's claim on training: each of its parts helps (Table 2, C to F).

    python experiments/edm_training.py --quick

Trains four networks alike: VP's preconditioning, noise levels and weight; EDM's
preconditioning; EDM's noise levels and weight too; and augmentation. All are drawn by Heun on
EDM's noise levels, so that only training differs. Writes the error by noise level, the Frechet
distance and a grid for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import measure
from experiments.report import claim, write_results
from plumbing.flags import run, script

LADDER = {
    "VP": "--precond vp",
    "EDM preconditioning": "--precond edm --p_train vp --weight vp",
    "EDM loss": "--precond edm --P_mean {P_mean}",
    "augmentation": "--precond edm --P_mean {P_mean} --augment 0.12",
}


def edm_training(
    *,
    quick: bool = False,  # 16x16 and 1,000 steps of each, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 20,000, quick 1,000
    P_mean: float = 0.0,  # centre of ln(sigma) in EDM's loss; the paper's -1.2 suits long runs
    n: int | None = None,  # samples of each; default 2,000, quick 128
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's flags, in quotes
    out: str = "runs/edm-training",  # folder of the runs and the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 1000, 20_000)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags)
    prepare(setup)
    results = []
    for k, words in enumerate(LADDER.values()):
        words = f"--method edm {three_levels(size)} {words.format(P_mean=P_mean)}"
        results.append(measure(setup, f"{setup.stem}-{k}", words, 18))
    rows = [dict(training=name) for name in LADDER]
    note = f"{data}, {steps} steps of 32 images, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"edm_training-{setup.stem}.csv", rows, results, note)
    found = [f"{name} {result.drawn.frechet}" for name, result in zip(LADDER, results)]
    text = "each part of EDM's training helps (EDM, Table 2, C to F)"
    paper = "VP, CIFAR-10: FID 2.31, 2.29, 2.05, 1.97"
    claim(text, paper, "Frechet " + ", ".join(found))


main = script(edm_training, __doc__)

if __name__ == "__main__":
    run(main)
