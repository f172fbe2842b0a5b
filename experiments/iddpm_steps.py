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
from experiments.common import Setup, choose, prepare, three_levels, train_once
from experiments.judge import Case, Judge, compare
from experiments.report import claim
from plumbing.drawing import changed
from plumbing.flags import UserError, run, script

SHORT = (10, 25, 50, 100)
LONG = (25, 50, 100, 200, 400, 1000)
FIXED = {"fixed, beta": "large", "fixed, beta_tilde": "small"}


def iddpm_steps(
    learned=None,
    fixed=None,
    *,
    quick: bool = False,  # 128 images of each, at most 100 steps, 16x16; for two CPU cores
    data: str = "digits",  # where no checkpoints are given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps of each; default 25,000, quick 2,000
    n: int | None = None,  # images of each; default 1,000, quick 128
    seeds: int = 3,  # times that each is drawn; their mean and spread count
    batch: int | None = None,  # images at a time; default 64, on CUDA 500
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's flags, in quotes
    out: str = "runs/iddpm-steps",  # folder of iddpm_steps.csv, .png and the grid
    device: str | None = None,  # cuda, mps or cpu
):
    """Draw, measure, write. UserError for checkpoints of another kind."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 2000, 25_000)
    n = choose(n, quick, 128, 1000)
    if (learned is None) != (fixed is None):
        raise UserError("give two checkpoints, of a learned and of a fixed variance, or none")
    setup = Setup(Path(out), data, size, train_steps, n, features, device, flags)
    prepare(setup, seeds=seeds, batch=batch, train_steps=train_steps)
    if learned is None:
        words = f"--method iddpm {three_levels(size)} --objective"
        learned = train_once(setup, f"hybrid-{setup.stem}", f"{words} hybrid")
        fixed = train_once(setup, f"simple-{setup.stem}", f"{words} simple")
    one = Judge(learned, features, n, seeds, batch, device)
    two = Judge(fixed, features, n, seeds, batch, device)
    if [getattr(judge.method, "learned", None) for judge in (one, two)] != [True, False]:
        kinds = "of iddpm --objective hybrid or vlb, and of --objective simple"
        raise UserError(f"{learned} and {fixed} must be {kinds}")
    T = min(one.method.T, two.method.T)
    lengths = [steps for steps in choose(None, quick, SHORT, LONG) if steps <= T]
    if not lengths:
        raise UserError(f"{learned} and {fixed} have too few steps to leave any out")
    found = compare(cases_of(one, two, lengths), setup.out / "iddpm_steps.csv", "steps")
    ends = []
    for steps in (lengths[0], lengths[-1]):
        names = ["learned", *FIXED, "DDIM"]
        distances = [f"{name} {found[name, steps].frechet}" for name in names]
        ends.append(f"{steps} steps: {', '.join(distances)}")
    text = "few steps cost little with a learned variance (Improved DDPM, Fig. 8)"
    paper = "100 of 4000 steps: near the full chain's FID; fixed variances fall behind"
    claim(text, paper, "; ".join(ends))


def cases_of(one, two, lengths):
    """The samplers, each in several numbers of steps; of a learned variance, and of a fixed."""
    cases = [Case("learned", k, one.chain(steps=k), one) for k in lengths]
    for name, variance in FIXED.items():
        cases += [Case(name, k, with_variance(two, variance, k), two) for k in lengths]
    cases += [Case("DDIM", k, two.chain(steps=k, eta=0.0), two) for k in lengths]
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
