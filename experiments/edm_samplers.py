"""EDM's claim on samplers: the same quality from far fewer evaluations of one network that was
trained as a DDPM (Fig. 2, Table 3).

    python experiments/edm_samplers.py --quick                      # trains the network first
    python experiments/edm_samplers.py runs/ddpm --quick

Draws from one checkpoint by the ancestral chain, DDIM, Euler and Heun, walks the ladder of
Fig. 2 (Heun, then EDM's noise levels, then its schedule, then its scaling), and varies rho;
writes a table, a plot if matplotlib is there, and a grid with a row for each sampler.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.common import Setup, choose, prepare, three_levels
from experiments.judge import case_of, compare, judges_of
from experiments.report import claim
from experiments.verdict import decide, repeats_of
from plumbing.flags import UserError, run, script

# The rungs of Fig. 2 below EDM's own, which is Heun in 18 steps
LADDER = {
    "Heun, all VP": dict(discretization="vp", schedule="vp", scaling="vp"),
    "EDM's levels": dict(schedule="vp", scaling="vp"),
    "EDM's levels and schedule": dict(scaling="vp"),
}


def edm_samplers(
    path=None,
    *,
    quick: bool = False,  # 128 images of each, fewer steps, 16x16; for two CPU cores
    data: str = "digits",  # where no checkpoint is given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps; default 30,000, quick 2,500
    n: int | None = None,  # images of each; default 2,000, quick 128
    seeds: int = 3,  # trainings, or where checkpoints are given times that each is drawn
    batch: int | None = None,  # images at a time; default 64, on CUDA 500
    features: str | None = None,  # TorchScript file; default one is trained; none: no distance
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-samplers",  # folder of edm_samplers.csv, .png and the grid
    device: str | None = None,  # cuda, mps or cpu
):
    """Draw, measure, write. UserError for a checkpoint of another kind."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 2500, 30_000)
    n = choose(n, quick, 128, 2000)
    setup = Setup(Path(out), data, size, train_steps, n, features, device, flags, seeds)
    prepare(setup, batch=batch, train_steps=train_steps)
    words = f"--method ddpm {three_levels(size)}"
    judges = judges_of(setup, path, f"ddpm-{setup.stem}", words, batch)
    T = getattr(judges[0].method, "T", 0)
    if T < 250:
        raise UserError(f"{path} is not of a DDPM (or Improved DDPM, PDM) of 250 steps or more")
    found = compare(cases_of(judges, quick, T), setup.out / "edm_samplers.csv", "evaluations")
    chain = found["ancestral", 250]
    heun = found["Heun", 18]
    text = "Heun in 35 evaluations is ahead of 250 ancestral steps (EDM, Table 2)"
    paper = "VP network, 2.93 against 3.01 in 1,000 evaluations"
    repeats = repeats_of(path)
    verdict = decide(heun.distances, chain.distances, paired=True, repeats=repeats)
    claim(text, paper, f"Frechet {heun.frechet} and {chain.frechet}", verdict)


def cases_of(judges, quick, T):
    """The samplers, each in several numbers of steps."""
    short = choose(None, quick, (18, 35), (10, 18, 35, 79))
    cases = []

    def add(name, steps, sampler, **options):
        cases.append(case_of(judges, name, steps, sampler, **options))

    for steps in choose(None, quick, (100, 250), sorted({50, 100, 250, T})):
        add("ancestral", steps, "own")
    for steps in short:
        add("DDIM", steps, "own", eta=0.0)
    for steps in short:
        add("Euler", steps, "euler")
    for steps in choose(None, quick, (5, 9, 18), (5, 9, 18, 40)):
        add("Heun", steps, "heun")
    add("Euler, all VP", 35, "euler", **LADDER["Heun, all VP"])
    for name, options in LADDER.items():
        add(name, 18, "heun", **options)
    for rho in (3.0, 5.0, 9.0):
        add(f"rho = {rho:g}", 18, "heun", rho=rho)
    return cases


main = script(edm_samplers, __doc__)

if __name__ == "__main__":
    run(main)
