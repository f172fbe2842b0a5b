"""EDM's choice of rho and of Heun, by truncation error (Sec. 3, App. D.1, Fig. 13).

    python experiments/edm_truncation.py --quick            # trains the network first
    python experiments/edm_truncation.py runs/edm --quick   # or looks at this one

Where an ODE ends does not depend on the solver, so a fine solution tells the error of a coarse
one. Writes the error of each single step of Heun against its noise level for several rho
(local.csv), and that of whole solutions against the evaluations (global.csv).
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, noise_range, ode_sample, sigma_steps
from experiments.common import Setup, check_counts, choose, prepare, three_levels, train_once
from experiments.report import claim, curves_of, plot, write
from experiments.truncation import heun_step, noise_of, reference, rmse
from plumbing import checkpoint
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
    prepare(setup)
    if path is None:
        path = train_once(setup, f"edm-{setup.stem}", f"--method edm {three_levels(size)}")
    method, saved = checkpoint.load(path, device=device)
    noise = noise_of(method, saved["shape"], n)
    with torch.no_grad():
        of_steps(setup, denoiser(method), noise, steps, fine)
        of_solutions(setup, denoiser(method), noise, lengths, fine)


def of_steps(setup, D, noise, steps, fine):
    """local.csv: the error of one step of Heun that begins on the reference."""
    rows = []
    ratios = []
    for rho in RHOS:
        sigmas = sigma_steps(steps, "edm", *noise_range("edm", None, None, D), rho)
        xs = reference(D, noise, (steps - 1) * fine + 1, rho)[::fine]
        errors = []
        for t, t_next, x, x_next in zip(sigmas, sigmas[1:], xs, xs[1:]):
            errors.append(rmse(heun_step(D, x, t, t_next), x_next))
            rows.append(dict(rho=f"{rho:g}", sigma=round(t.item(), 4), rmse=errors[-1]))
        ratios.append(max(errors) / min(errors))
    write(setup.out / "local.csv", rows, f"one step of {steps}, {len(noise)} images")
    curves = curves_of(rows, "rho", "sigma", "rmse")
    plot(setup.out / "local.png", curves, "sigma", "rmse", "xy")
    found = ", ".join(f"{ratio:.0f} at rho = {rho:g}" for rho, ratio in zip(RHOS, ratios))
    verdict = "yes" if min(ratios) == ratios[RHOS.index(3.0)] else "no"
    text = "rho = 3 makes all steps err about alike (EDM, App. D.1)"
    claim(text, "", f"largest error over smallest {found}", verdict)


def of_solutions(setup, D, noise, lengths, fine):
    """global.csv: how far the end of a coarse solution lies from that of a fine one."""
    end = reference(D, noise, fine * max(lengths), 7.0)[-1]
    rows = []
    for solver in ("euler", "heun"):
        for steps in lengths:
            *_, (x, _) = ode_sample(D, noise, steps=steps, solver=solver)
            cost = steps if solver == "euler" else 2 * steps - 1
            rows.append(dict(solver=solver, evaluations=cost, rmse=rmse(x, end)))
    write(setup.out / "global.csv", rows, f"rho = 7, {len(noise)} images")
    curves = curves_of(rows, "solver", "evaluations", "rmse")
    plot(setup.out / "global.png", curves, "evaluations", "rmse", "xy")
    euler, heun = (curve.y[-2] / curve.y[-1] for curve in curves)
    ours = f"twice the steps divide Euler's error by {euler:.1f}, Heun's by {heun:.1f}"
    verdict = "yes" if heun > euler else "no"
    claim("Heun's error falls faster than Euler's (EDM, Sec. 3)", "h^2, h", ours, verdict)


main = script(edm_truncation, __doc__)

if __name__ == "__main__":
    run(main)
