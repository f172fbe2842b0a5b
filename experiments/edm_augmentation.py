"""EDM's claim on augmentation: it draws better where a network would learn its few images by
heart (Table 2, F).

    python experiments/edm_augmentation.py --quick

Trains EDM on a few images, with and without augmentation, and writes the error on held-out
images along the way (overfitting.csv and .png, of the first training), which tells whether it
rises again; the error by noise level, the Frechet distance from all images, and a grid.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import LEVEL, Judge, measure, verdict
from experiments.report import claim, curves_of, plot, write, write_results
from plumbing.flags import run, script

CASES = {"without": 0.0, "with": 0.12}  # the paper's probability on CIFAR-10


def edm_augmentation(
    *,
    quick: bool = False,  # 16x16, 500 images and 4,000 steps of each, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    few: int | None = None,  # images to train on; default 2,000, quick 500
    steps: int | None = None,  # training steps of each; default 60,000, quick 4,000
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-augmentation",  # folder of the runs and the tables
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the tables. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    few = choose(few, quick, 500, 2000)
    steps = choose(steps, quick, 4000, 60_000)
    n = choose(n, quick, 128, 2000)
    every = max(1, steps // 6)
    words = f"--overfit {few} --every {every} --keep 6 {flags}"
    setup = Setup(Path(out), data, size, steps, n, features, device, words, seeds)
    prepare(setup, few=few)
    results = []
    along = []
    for name, augment in CASES.items():
        line = f"--method edm {three_levels(size)} --P_mean 0 --augment {augment}"
        results.append(measure(setup, f"{setup.stem}-{name}", line, 18))
        along += errors_along(name, results[-1].paths[0], setup)

    table = setup.out / f"overfitting-{setup.stem}.csv"
    write(table, along, f"{LEVEL} of held-out images, first training")
    plot(table.with_suffix(".png"), curves_of(along, "case", "step", LEVEL), "step", LEVEL, "")
    rows = [dict(augmentation=name) for name in CASES]
    note = f"{few} images of {data}, {steps} steps, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"edm_augmentation-{setup.stem}.csv", rows, results, note)
    plain, augmented = results
    ours = f"Frechet {plain.drawn.frechet} and {augmented.drawn.frechet}"
    text = f"augmentation draws better from {few} images (EDM, Table 2, of 50,000 images)"
    claim(text, "FID 2.05 and 1.97", ours, verdict(augmented, plain))


def errors_along(name, path, setup):
    """The rows of a table: a training's held-out error at each checkpoint that it kept."""
    rows = []
    for kept in sorted(path.parent.glob("ckpt-*.pt")):
        judge = Judge(kept, "none", setup.n, device=setup.device)
        error = judge.errors(kept.with_suffix(".csv"))[LEVEL]
        rows.append({"case": name, "step": judge.saved["step"], LEVEL: round(error, 5)})
    return rows


main = script(edm_augmentation, __doc__)

if __name__ == "__main__":
    run(main)
