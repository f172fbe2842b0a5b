"""PDM's evidence: how patch sizes compare.

    python experiments/pdm_patches.py --quick

Trains P = 1, 2, 4, 8 alike (same U-Net, same images), then measures for each: error of the
x_0-prediction against the noise level (the curves should part only at low noise), seconds a
training step, seconds and peak memory of a sample, Frechet distance on features of the data,
and a grid. --speed only times untrained networks, for sizes too large to train here.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import TWO_LEVELS, Setup, check_counts, choose, prepare
from experiments.costs import costs_of
from experiments.judge import measure
from experiments.report import claim, write, write_results
from experiments.verdict import decide
from plumbing import device as devices
from plumbing.flags import UserError, run, script

LEVELS = ("rmse_0.2", "rmse_5")  # low noise and high


def pdm_patches(
    *,
    quick: bool = False,  # 16x16 and 800 steps of each, for two CPU cores
    data: str = "digits",  # digits, or what train.py's --data takes
    size: int | None = None,  # image size; default 32, quick 16
    patches: tuple[int, ...] = (1, 2, 4, 8),  # patch sizes to compare
    steps: int | None = None,  # training steps of each; default 10,000, quick 800
    n: int | None = None,  # samples of each; default 2,000, quick 128
    chain: int = 50,  # sampling steps
    batch: int | None = None,  # images of a timing; default 256, for a GPU, quick or --speed 16
    repeats: int = 5,  # timings, interleaved; the median counts
    seeds: int = 3,  # trainings of each; their means and their scatter decide
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    speed: bool = False,  # only time and weigh untrained networks
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/pdm-patches",  # folder of the runs, pdm_patches.csv and the grids
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, measure, write the table. A run that is there already is used as it is."""
    size = choose(size, quick, 16, 32)
    steps = choose(steps, quick, 800, 10_000)
    batch = choose(batch, quick or speed, 16, 256)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, steps, n, features, device, flags, seeds)
    check_counts(1, patches=patches, chain=chain, batch=batch, repeats=repeats)
    if len(set(patches)) < 2:
        raise UserError("--patches takes two sizes or more, to compare")
    prepare(setup)
    costs = costs_of(size, patches, batch, repeats, devices.pick(device))
    rows = [dict(P=P) | cost.columns(costs[min(patches)]) for P, cost in costs.items()]
    note = f"{n} samples in {chain} steps"
    first = min(patches)
    last = 4 if 4 in patches and first < 4 else max(patches)
    found = rows[patches.index(last)]
    ours = f"P = {last} against {first}: {found['speedup']}x, memory {found['memory_ratio']}"
    times = (last / first) ** 2
    verdict = "yes" if found["speedup"] >= times else "not quite"
    if speed:
        write(setup.out / f"pdm_patches-{setup.stem}-speed.csv", rows, note)
    claim("patches cost P^2 times less to sample (PDM)", f"{times:g}x", ours, verdict)
    if not speed:
        results = {}
        for P in patches:
            words = f"--method pdm {TWO_LEVELS} --patch {P}"
            results[P] = measure(setup, f"{setup.stem}-P{P}", words, chain)
        table = setup.out / f"pdm_patches-{setup.stem}.csv"
        write_results(table, rows, list(results.values()), note)
        claim_errors(first, results[first], last, results[last])


def claim_errors(first, fine, last, coarse):
    """Where the errors of two patch sizes part: at low noise, and not at high."""
    for level in LEVELS:
        text = f"P = {first} errs less than P = {last}, {level} (PDM: at low noise only)"
        ours = f"{fine.columns()[level]} and {coarse.columns()[level]}"
        claim(text, "", ours, decide(fine.errors[level], coarse.errors[level]))


main = script(pdm_patches, __doc__)

if __name__ == "__main__":
    run(main)
