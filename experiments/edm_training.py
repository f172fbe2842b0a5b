"""EDM's claim on training: its preconditioning and its loss help (Table 2, C to E).

    python experiments/edm_training.py --quick

Trains alike: VP's preconditioning, noise levels and weight; EDM's preconditioning; EDM's noise
levels and weight too. All are drawn by Heun on EDM's noise levels, so that only training
differs. Writes the error by noise level, the Frechet distance and a grid for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import measure
from experiments.report import claim, write_results
from experiments.verdict import decide
from plumbing.flags import run, script

LADDER = {
    "VP": "--precond vp",
    "EDM preconditioning": "--precond edm --p_train vp --weight vp",
    "EDM loss": "--precond edm --P_mean {P_mean}",
}
HIGH = 50  # a noise level at which VP errs


def edm_training(
    *,
    quick: bool = False,  # 16x16 and 1,000 steps of each, for two CPU cores
    data: str = "digits",  # or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    steps: int | None = None,  # training steps of each; default 20,000, quick 1,000
    P_mean: float = 0.0,  # centre of ln(sigma) in EDM's loss; the paper's -1.2 suits long runs
    n: int | None = None,  # samples of each; default 2,000, quick 128
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-training",  # folder of the runs and the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 1000, 20_000)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    prepare(setup)
    results = []
    for k, words in enumerate(LADDER.values()):
        words = f"--method edm {three_levels(size)} {words.format(P_mean=P_mean)}"
        results.append(measure(setup, f"{setup.stem}-{k}", words, 18))
    rows = [dict(training=name) for name in LADDER]
    note = f"{data}, {steps} steps of 32 images, {n} samples by Heun in 18 steps"
    write_results(setup.out / f"edm_training-{setup.stem}.csv", rows, results, note)
    vp, preconditioned, edm = results
    high = f"rmse_{HIGH} of VP {vp.columns()[f'rmse_{HIGH}']}"
    ours = f"{high}, of EDM's preconditioning {preconditioned.columns()[f'rmse_{HIGH}']}"
    verdict = decide(preconditioned.errors[f"rmse_{HIGH}"], vp.errors[f"rmse_{HIGH}"])
    claim("preconditioning makes high noise learnable (EDM, Sec. 5)", "", ours, verdict)
    ours = f"Frechet {preconditioned.drawn.frechet} with VP's loss, {edm.drawn.frechet} with it"
    verdict = decide(edm.drawn.distances, preconditioned.drawn.distances)
    claim("EDM's loss draws better (EDM, Table 2, D and E)", "FID 2.29, 2.05", ours, verdict)


main = script(edm_training, __doc__)

if __name__ == "__main__":
    run(main)
