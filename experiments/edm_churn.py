"""EDM's claim on stochastic sampling: Algorithm 2 corrects errors, and does so better than a
general SDE solver (Sec. 4, Figs. 4 and 5).

    python experiments/edm_churn.py --no-network        # a mixture whose score is known
    python experiments/edm_churn.py --quick             # and a network, which is trained first
    python experiments/edm_churn.py runs/edm --quick    # or this one

On the mixture (mixture.py): the distance of samples to the truth for Euler-Maruyama and for
Algorithm 2, at equal evaluations, with the exact denoiser and with one that errs as a network
does. On the network: the same samplers, and S_churn and S_noise, by Frechet distance.
"""
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import Case, case_of, compare, judges_of
from experiments.mixture import distances_of, euler_maruyama
from experiments.report import claim, curves_of, plot, write
from experiments.verdict import decide, repeats_of
from plumbing.flags import run, script

# (S_churn, S_noise)
CHURNS = [(0, 1.0), (5, 1.003), (10, 1.003), (20, 1.0), (20, 1.003)]
STEPS = 32


def edm_churn(
    path=None,
    *,
    quick: bool = False,  # 16x16, 1,500 steps and fewer images, for two CPU cores
    network: bool = True,  # --no-network: the mixture alone
    data: str = "digits",  # where no checkpoint is given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps; default 30,000, quick 1,500
    images: int | None = None,  # images of each sampler; default 2,000, quick 128
    n: int | None = None,  # samples of the mixture; default 50,000, quick 10,000
    seeds: int = 3,  # trainings, or where checkpoints are given times that each is drawn
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-churn",  # folder of the tables
    device: str | None = None,  # cuda, mps or cpu, for the network
):
    """Write mixture.csv, and churn.csv with a grid of the network's images."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 1500, 30_000)
    images = choose(images, quick, 128, 2000)
    n = choose(n, quick, 10_000, 50_000)
    setup = Setup(Path(out), data, size, train_steps, n, features, device, flags, seeds)
    prepare(setup, images=images, train_steps=train_steps)
    if network:
        words = f"--method edm {three_levels(size)}"
        judges = judges_of(setup._replace(n=images), path, f"edm-{setup.stem}", words)
        on_the_network(setup, judges, repeats_of(path))
    on_the_mixture(setup, seeds)


def on_the_mixture(setup, seeds):
    """mixture.csv and its plot."""
    rows = distances_of(setup.n, seeds)
    note = f"{setup.n} samples, Wasserstein-1 distance, mean of {seeds} seeds; S_churn a step"
    write(setup.out / "mixture.csv", [row.columns() for row in rows], note)
    points = []
    for row in rows:
        for name, values in row.distances.items():
            point = dict(case=f"{name}, error {row.error:g}", evaluations=row.evaluations)
            points.append(point | dict(distance=statistics.mean(values)))
    curves = curves_of(points, "case", "evaluations", "distance")
    plot(setup.out / "mixture.png", curves, "evaluations", "distance", log="xy")
    _, ode, *_, churn = rows[-1].distances.values()
    ours = f"{statistics.mean(ode):.4f} by the ODE, {statistics.mean(churn):.4f} with churn"
    verdict = decide(churn, ode, repeats="seeds")
    claim("churn removes an error of 5% (EDM, Sec. 4)", "", ours, verdict)


def on_the_network(setup, judges, repeats):
    """churn.csv, its plot and its grid; every sampler at the same number of evaluations."""
    count = 2 * STEPS - 1
    denoisers = [denoiser(judge.method) for judge in judges]
    solvers = [functools.partial(euler_maruyama, D, steps=count) for D in denoisers]
    cases = [Case("Euler-Maruyama", count, solvers, judges)]
    for S_churn, S_noise in CHURNS:
        name = f"S_churn {S_churn}, S_noise {S_noise}"
        cases.append(case_of(judges, name, STEPS, "heun", S_churn=S_churn, S_noise=S_noise))
    drawn = compare(cases, setup.out / "churn.csv", "evaluations")
    sde, ode, *_, churned = drawn.values()
    ours = f"Frechet {ode.frechet} by the ODE, {churned.frechet}, {sde.frechet} by the SDE"
    of_ode, of_sde = (decide(churned.distances, d.distances, True, repeats) for d in (ode, sde))
    verdict = f"ahead of the ODE: {of_ode}; of the SDE: {of_sde}"
    claim("churn removes a network's errors (EDM, Sec. 4)", "", ours, verdict)


main = script(edm_churn, __doc__)

if __name__ == "__main__":
    run(main)
