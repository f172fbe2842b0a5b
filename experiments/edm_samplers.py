"""EDM's claim on samplers: the same quality from far fewer evaluations of one network that was trained as a DDPM (Fig. 2, Table 3).

    python experiments/edm_samplers.py --quick                      # trains the network first
    python experiments/edm_samplers.py runs/ddpm/ckpt.pt --quick

Draws from one checkpoint by the ancestral chain, DDIM, Euler and Heun, walks the ladder of Fig. 2 (Heun, then EDM's noise levels, then its schedule,
then its scaling), and varies rho; writes a table, a plot if matplotlib is there, and a grid with a row for each sampler.
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, ode_sample
from train import command, script
from common import Score, check, claim, run_once, three_levels


def edm_samplers(path=None, *,
                 features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                 quick: bool = False,           # 128 images of each, fewer steps and a network of 16x16, for two CPU cores
                 data: str = "digits",          # where no checkpoint is given: what train.py's --data takes,
                 size: int | None = None,       # image size; default 32, quick 16,
                 train_steps: int | None = None,  # and training steps; default 30,000, quick 2,500
                 n: int | None = None,          # images of each; default 2,000, quick 128
                 seeds: int = 3,                # times that each is drawn; their mean and spread count
                 batch: int | None = None,      # images at a time; default 64, on CUDA 500
                 out: str = "runs/edm-samplers",  # folder of edm_samplers.csv, .png and the grid
                 device: str | None = None):    # cuda, mps or cpu
    """Draw, measure, write. Raises ValueError for a file that is none."""
    check(features)
    size = size or (16 if quick else 32)
    path = path or run_once(Path(out) / f"ddpm-{Path(data).stem}-{size}", f"--method ddpm --size {size} {three_levels(size)}", data, train_steps or (2500 if quick else 30_000), device)
    score = Score(path, features, n or (128 if quick else 2000), seeds, device, batch)
    if getattr(score.method, "T", 0) < 250:
        raise ValueError(f"{path} is not of a DDPM (or Improved DDPM, PDM) with 250 steps or more")
    D, own = denoiser(score.method), score.method.sample
    ode = functools.partial(ode_sample, D)
    old = dict(discretization="vp", schedule="vp", scaling="vp")
    cases = [("ancestral", steps, own, dict(steps=steps)) for steps in ((100, 250) if quick else sorted({50, 100, 250, score.method.T}))]
    cases += [("DDIM", steps, own, dict(steps=steps, eta=0.0)) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Euler", steps, ode, dict(steps=steps, solver="euler")) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Heun", steps, ode, dict(steps=steps)) for steps in ((5, 9, 18) if quick else (5, 9, 18, 40))]
    cases += [("Euler, all VP", 35, ode, old | dict(steps=35, solver="euler"))]
    cases += [(name, 18, ode, dict(steps=18) | options) for name, options in (                  # the last rung, and rho = 7, is Heun in 18 steps above
        ("Heun, all VP", old), ("EDM's levels", old | dict(discretization="edm")), ("EDM's levels and schedule", dict(scaling="vp")))]
    cases += [(f"rho = {rho}", 18, ode, dict(steps=18, rho=rho)) for rho in (3, 5, 9)]
    found = {(line["sampler"], line["steps"]): line for line in score.table(cases, Path(out) / "edm_samplers.csv", "evaluations")}
    one, two = found["ancestral", 250], found["Heun", 18]
    claim("Heun on EDM's noise levels needs far fewer evaluations of one network (EDM, Table 3)", "VP network, 256 to 35 evaluations: 2.85 to 2.93 FID",
        f"Frechet {one.get('frechet')} in {one['evaluations']}, {two.get('frechet')} in {two['evaluations']}")


main = script(edm_samplers, __doc__)

if __name__ == "__main__":
    command(main)
