"""PDM's other finding: which training target and weight are robust.

    python experiments/pdm_targets.py --quick

Trains x, eps and v, and for x the weights 1, sqrt_snr and snr, with and without patches, all
alike; writes the error of the x_0-prediction by noise level, the Frechet distance on features
of the data, and a grid of samples for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import TWO_LEVELS, Setup, check_counts, choose, prepare
from experiments.judge import measure
from experiments.report import claim, write_results
from experiments.verdict import decide
from plumbing.flags import run, script

# (target, weight)
CASES = [
    ("x", "sqrt_snr"),
    ("x", "1"),
    ("x", "snr"),
    ("v", "sqrt_snr"),
    ("eps", "sqrt_snr"),
    ("eps", "snr"),
]


def pdm_targets(
    *,
    quick: bool = False,  # 16x16 and 250 steps of each, for two CPU cores
    data: str = "digits",  # digits, or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    patches: tuple[int, ...] = (1, 4),  # patch sizes
    schedule: str = "linear",  # the paper's; cosine: sqrt(SNR) weighs eps 130 times more at T
    steps: int | None = None,  # training steps of each; default 5,000, quick 250
    n: int | None = None,  # samples of each; default 1,000, quick 128
    chain: int = 50,  # sampling steps
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/pdm-targets",  # folder of the runs, pdm_targets.csv and the grids
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 250, 5000)
    n = choose(n, quick, 128, 1000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    check_counts(1, patches=patches, chain=chain)
    prepare(setup)
    rows = [dict(P=P, predict=target, weight=w) for P in patches for target, w in CASES]
    results = []
    for row in rows:
        name = "{}-P{P}-{predict}-{weight}-{}".format(setup.stem, schedule, **row)
        words = f"--method pdm {TWO_LEVELS} "
        words += "--patch {P} --predict {predict} --weight {weight}".format(**row)
        results.append(measure(setup, name, f"{words} --schedule {schedule}", chain))
    table = setup.out / f"pdm_targets-{setup.stem}-{schedule}.csv"
    write_results(table, rows, results, f"{n} samples in {chain} steps")
    for P in patches:
        of_P = [(row, result) for row, result in zip(rows, results) if row["P"] == P]
        claim_for(P, best_of_each(of_P))


def best_of_each(cases):
    """{target: (weight, Drawn)} of the weight with which each target draws best."""
    best = {}
    for row, result in sorted(cases, key=lambda case: case[1].drawn.frechet or 0):
        best.setdefault(row["predict"], (row["weight"], result.drawn))
    return best


def claim_for(P, best):
    words = [f"{target} {drawn.frechet} ({weight})" for target, (weight, drawn) in best.items()]
    x, v, eps = (best[target][1].distances for target in ("x", "v", "eps"))
    verdict = f"x: {decide(x, eps)}; v: {decide(v, eps)}"
    text = f"x and v draw better than eps, each with its best weight, P = {P} (PDM)"
    claim(text, "", "Frechet " + ", ".join(words), verdict)


main = script(pdm_targets, __doc__)

if __name__ == "__main__":
    run(main)
