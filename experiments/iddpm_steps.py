"""Improved DDPM's claim on short chains: with a learned variance few steps lose little; with a
fixed one they do (Fig. 8).

    python experiments/iddpm_steps.py --quick                       # trains both networks first
    python experiments/iddpm_steps.py runs/hybrid runs/simple --quick

Draws from the first by its learned variance, from the second by both fixed ones (beta,
beta_tilde) and by DDIM, in 10 to 100 steps (without --quick 25 to 1000); writes a table, a plot
if matplotlib is there, and a grid.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import Case, case_of, compare, judges_of
from experiments.report import claim
from experiments.verdict import decide, repeats_of
from plumbing.drawing import changed
from plumbing.flags import UserError, run, script

SHORT = (10, 25, 50, 100)
LONG = (25, 50, 100, 200, 400, 1000)
FIXED = {"fixed, beta": "large", "fixed, beta_tilde": "small"}
ORDER = [("learned", "fixed, beta"), ("learned", "fixed, beta_tilde"), ("DDIM", "learned")]


def iddpm_steps(
    learned=None,
    fixed=None,
    *,
    quick: bool = False,  # 128 images of each, at most 100 steps, 16x16; for two CPU cores
    data: str = "digits",  # where no checkpoints are given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps of each; default 25,000, quick 2,000
    n: int | None = None,  # images of each; default 1,000, quick 128
    seeds: int = 3,  # trainings, or where checkpoints are given times that each is drawn
    batch: int | None = None,  # images at a time; default 64, on CUDA 500
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/iddpm-steps",  # folder of iddpm_steps.csv, .png and the grid
    device: str | None = None,  # cuda, mps or cpu
):
    """Draw, measure, write. UserError for checkpoints of another kind."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 2000, 25_000)
    n = choose(n, quick, 128, 1000)
    if (learned is None) != (fixed is None):
        raise UserError("give two checkpoints, of a learned and of a fixed variance, or none")
    setup = Setup(Path(out), data, size, train_steps, n, features, device, flags, seeds)
    prepare(setup, batch=batch, train_steps=train_steps)
    words = f"--method iddpm {three_levels(size)} --objective"
    one = judges_of(setup, learned, f"hybrid-{setup.stem}", f"{words} hybrid", batch)
    two = judges_of(setup, fixed, f"simple-{setup.stem}", f"{words} simple", batch)
    if [getattr(judges[0].method, "learned", None) for judges in (one, two)] != [True, False]:
        kinds = "of iddpm --objective hybrid or vlb, and of --objective simple"
        raise UserError(f"{learned} and {fixed} must be {kinds}")
    T = min(judges[0].method.T for judges in (one, two))
    lengths = [steps for steps in choose(None, quick, SHORT, LONG) if steps <= T]
    if not lengths:
        raise UserError(f"{learned} and {fixed} have too few steps to leave any out")
    found = compare(cases_of(one, two, lengths), setup.out / "iddpm_steps.csv", "steps")
    few = lengths[0]
    for name, other in ORDER:
        ahead = found[name, few]
        behind = found[other, few]
        text = f"{name} is ahead of {other} in {few} steps (Improved DDPM, Fig. 8)"
        verdict = decide(ahead.distances, behind.distances, repeats=repeats_of(learned))
        claim(text, "", f"Frechet {ahead.frechet} and {behind.frechet}", verdict)


def cases_of(one, two, lengths):
    """The samplers, each in several numbers of steps; of a learned variance, and of a fixed."""
    cases = [case_of(one, "learned", k, "own") for k in lengths]
    for name, variance in FIXED.items():
        for k in lengths:
            cases.append(Case(name, k, [with_variance(j, variance, k) for j in two], two))
    cases += [case_of(two, "DDIM", k, "own", eta=0.0) for k in lengths]
    return cases


def with_variance(judge, variance, steps):
    """The method's own sampler with another fixed variance than it was trained with."""
    own = judge.chain(steps=steps)

    def run_with(noise, y=None, **options):
        with changed(judge.method, variance=variance):
            yield from own(noise, y, **options)

    return run_with


main = script(iddpm_steps, __doc__)

if __name__ == "__main__":
    run(main)
