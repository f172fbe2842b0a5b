"""EDM's choice of rho and of Heun, by truncation error (Sec. 3, App. D.1, Fig. 13).

    python experiments/edm_truncation.py --quick            # trains the network first
    python experiments/edm_truncation.py runs/edm --quick   # or looks at this one

Where an ODE ends does not depend on the solver, so a fine solution tells the error of a coarse
one. Writes the error of each single step of Heun against the noise level where it ends, for
several rho (local.csv), and that of whole solutions against the evaluations (global.csv), of
one network. The paper begins a step on a noisy image, not on the fine solution.
"""
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, ode_sample
from experiments import truncation
from experiments.common import Setup, check_counts, choose, prepare, three_levels, train_once
from experiments.report import claim
from plumbing import checkpoint
from plumbing.drawing import last
from plumbing.flags import run, script

RHOS = (1.0, 3.0, 7.0, 15.0)


def edm_truncation(
    path=None,
    *,
    quick: bool = False,  # 16x16, 1,500 steps of training and 16 images, for two CPU cores
    steps: int = 18,  # N, of the sampler whose single steps are looked at
    lengths: tuple[int, ...] = (5, 9, 18, 36),  # N of the whole solutions, rising
    fine: int = 16,  # steps of the reference in one of ours
    data: str = "digits",  # where no checkpoint is given: what train.py's --data takes,
    size: int | None = None,  # image size; default 32, quick 16,
    train_steps: int | None = None,  # and training steps; default 30,000, quick 1,500
    n: int | None = None,  # images; default 64, quick 16
    flags: str = "",  # more of train.py's, as --flags='--flip --lr 1e-3'
    out: str = "runs/edm-truncation",  # folder of the tables and plots
    device: str | None = None,  # cuda, mps or cpu
):
    """Write local.csv and global.csv with a plot each, and the verdicts."""
    size = choose(size, quick, 16, 32)
    train_steps = choose(train_steps, quick, 1500, 30_000)
    n = choose(n, quick, 16, 64)
    setup = Setup(Path(out), data, size, train_steps, n, "none", device, flags)
    check_counts(2, steps=steps, lengths=lengths, fine=fine)
    truncation.check_rising("lengths", lengths)
    prepare(setup)
    if path is None:
        path = train_once(setup, f"edm-{setup.stem}", f"--method edm {three_levels(size)}")
    method, saved = checkpoint.load(path, device=device)
    D = denoiser(method)
    truncation.check_levels(D, path)
    noise = truncation.noise_of(method, saved["shape"], n)
    with torch.no_grad():
        of_steps(setup, D, noise, steps, fine)
        of_solutions(setup, D, noise, lengths, fine)


def of_steps(setup, D, noise, steps, fine):
    """local.csv: the error of one step of Heun that begins on the reference."""
    rows = []
    peaks = {}
    for rho in RHOS:
        errors = truncation.step_errors(D, noise, steps, fine, rho)
        name = f"{rho:g}"
        rows += [dict(rho=name, sigma=round(t, 4), rmse=error) for t, error in errors.items()]
        peaks[rho] = max(errors.values()) / statistics.mean(errors.values())
    truncation.save(setup.out / "local.csv", rows, f"one step of {steps}, {len(noise)} images")
    ours = ", ".join(f"{peak:.1f} at rho = {rho:g}" for rho, peak in peaks.items())
    verdict = "yes" if min(peaks, key=peaks.get) == 3.0 else "no"
    text = "rho = 3 comes nearest to equal errors of all steps (EDM, Sec. 3)"
    claim(text, "", f"largest over mean error {ours}", f"{verdict}, of this network")


def of_solutions(setup, D, noise, lengths, fine):
    """global.csv: how far the end of a coarse solution lies from that of a fine one."""
    end = last(ode_sample(D, noise, steps=fine * max(lengths)))
    rows = []
    orders = {}
    for solver in ("euler", "heun"):
        errors = truncation.solution_errors(D, noise, lengths, solver, end)
        rows += [dict(solver=solver, evaluations=cost, rmse=e) for cost, e in errors.items()]
        orders[solver] = truncation.order([*errors.values()], lengths)
    truncation.save(setup.out / "global.csv", rows, f"rho = 7, {len(noise)} images")
    ours = ", ".join(f"{solver} h^{p:.1f}" for solver, p in orders.items())
    verdict = "yes" if orders["heun"] > orders["euler"] else "no"
    text = "Heun's error falls faster with the step h than Euler's (EDM, Sec. 3)"
    claim(text, "a step: euler h^2, heun h^3", ours, f"{verdict}, of this network")


main = script(edm_truncation, __doc__)

if __name__ == "__main__":
    run(main)
