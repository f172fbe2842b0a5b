"""EDM's search for the churn of a network (Table 5): S_tmin, S_tmax and S_noise, by grid.

    python experiments/edm_churn_grid.py --quick             # trains the network first
    python experiments/edm_churn_grid.py runs/edm --quick    # or searches for this one

Draws from one network by Algorithm 2 with every combination, and without churn, all from the
same noise; writes the Frechet distances and a grid of images, and says whether the best row is
ahead of no churn by more than chance. The best of many rows flatters itself: believe it
when more seeds (--seeds) and images (--n) say the same.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, check_counts, choose, prepare, three_levels
from experiments.judge import case_of, compare, judges_of
from experiments.report import claim
from experiments.verdict import decide, repeats_of
from plumbing.flags import run, script

ODE = "no churn"


def edm_churn_grid(
    path=None,
    *,
    quick: bool = False,  # 16x16, 1,500 steps and fewer images, for two CPU cores
    S_churn: float = 20.0,  # of every row; the most that counts is .41 of the sampler's steps
    S_tmin: tuple[float, ...] = (0.0, 0.05, 0.5),  # churn from these noise levels
    S_tmax: tuple[float, ...] = (1.0, 50.0),  # up to these
    S_noise: tuple[float, ...] = (1.0, 1.003, 1.007),  # inflation of the fresh noise
    chain: int = 32,  # steps of the sampler
    data: str = "digits",  # where no checkpoint is given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps; default 30,000, quick 1,500
    n: int | None = None,  # images of each; default 2,000, quick 128
    seeds: int = 3,  # trainings, or where checkpoints are given times that each is drawn
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-churn",  # folder of the table
    device: str | None = None,  # cuda, mps or cpu
):
    """Write churn_grid.csv with its grid of images, and the verdict."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 1500, 30_000)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, train_steps, n, features, device, flags, seeds)
    check_counts(0, S_churn=S_churn, S_tmin=S_tmin, S_tmax=S_tmax, S_noise=S_noise)
    prepare(setup, chain=chain, train_steps=train_steps)
    words = f"--method edm {three_levels(size)}"
    judges = judges_of(setup, path, f"edm-{setup.stem}", words)
    cases = cases_of(judges, chain, S_churn, itertools.product(S_tmin, S_tmax, S_noise))
    drawn = compare(cases, setup.out / "churn_grid.csv", "evaluations")
    text = "a search finds churn that draws better than none (EDM, Table 5)"
    paper = "its own network on ImageNet-64: .05 to 50, S_noise 1.003; on CIFAR-10 no churn"
    repeats = repeats_of(path)
    best, told = verdict({name: one for (name, _), one in drawn.items()}, repeats)
    claim(text, paper, best, told)


def cases_of(judges, steps, S_churn, grid):
    """No churn, and a Case for each (S_tmin, S_tmax, S_noise) of the grid."""
    cases = [case_of(judges, ODE, steps, "heun")]
    for low, high, inflation in grid:
        churn = dict(S_churn=S_churn, S_tmin=low, S_tmax=high, S_noise=inflation)
        name = f"{low:g} to {high:g}, S_noise {inflation:g}"
        cases.append(case_of(judges, name, steps, "heun", **churn))
    return cases


def verdict(drawn, repeats="trainings"):
    """Which row is best, and whether that is more than chance; drawn: {name: Drawn}."""
    if drawn[ODE].frechet is None:
        return "", "no distance was measured"
    best = min(drawn, key=lambda name: drawn[name].frechet)
    if best == ODE:
        return f"{drawn[ODE].frechet} without churn", "no row is below it"
    words = f"{drawn[best].frechet} by {best}, {drawn[ODE].frechet} without churn"
    told = decide(drawn[best].distances, drawn[ODE].distances, True, repeats)
    return words, f"{told}; the best of {len(drawn) - 1} rows"


main = script(edm_churn_grid, __doc__)

if __name__ == "__main__":
    run(main)
