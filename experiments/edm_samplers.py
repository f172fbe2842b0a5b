"""EDM's claim on samplers: the same quality from far fewer evaluations of one network that was trained as a DDPM (Fig. 2, Table 3).

    python experiments/features.py --data digits && python experiments/edm_samplers.py runs/ddpm/ckpt.pt --features digits-features.pt --quick

Draws from one checkpoint by the ancestral chain, DDIM, Euler and Heun, walks the ladder of Fig. 2 (Heun, then EDM's noise levels, then its schedule
and scaling), and varies rho; writes a table, a plot if matplotlib is there, and a grid with a row for each sampler.
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, ode_sample
from train import command, script
from common import Score, claim


def edm_samplers(path, *,
                 features: str = "digits-features.pt",  # TorchScript file for the Frechet distance (experiments/features.py)
                 quick: bool = False,           # 64 images of each and fewer steps, for two CPU cores
                 n: int | None = None,          # images of each; default 2,000, quick 64
                 seeds: int = 3,                # times that each is drawn; their mean and spread count
                 batch: int = 64,               # images at a time
                 out: str = "runs/edm-samplers",  # folder of edm_samplers.csv, .png and the grid
                 device: str | None = None):    # cuda, mps or cpu
    """Draw, measure, write. Raises ValueError for a file that is none."""
    score = Score(path, features, n or (64 if quick else 2000), seeds, batch, device)
    if getattr(score.method, "T", 0) < 250:
        raise ValueError(f"{path} is not of a DDPM (or Improved DDPM, PDM) with 250 steps or more")
    D, own = denoiser(score.method), score.method.sample
    ode = functools.partial(ode_sample, D)
    old = dict(discretization="vp", schedule="vp", scaling="vp")
    cases = [("ancestral", steps, own, dict(steps=steps)) for steps in ((100, 250) if quick else (50, 100, 250, 1000))]
    cases += [("DDIM", steps, own, dict(steps=steps, eta=0.0)) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Euler", steps, ode, dict(steps=steps, solver="euler")) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Heun", steps, ode, dict(steps=steps)) for steps in ((5, 9, 18) if quick else (5, 9, 18, 40))]
    cases += [(name, 18, ode, dict(steps=18) | options) for name, options in (
        ("Euler, all VP", old | dict(solver="euler", steps=35)), ("Heun, all VP", old),
        ("Heun, EDM levels", old | dict(discretization="edm")), ("Heun, all EDM", {}))]
    cases += [(f"rho = {rho}", 18, ode, dict(steps=18, rho=rho)) for rho in (3, 5, 7, 9)]
    found = {(line["sampler"], line["steps"]): line for line in score.table(cases, Path(out) / "edm_samplers.csv", "evaluations")}
    one, two = found["ancestral", 250], found["Heun", 18]
    claim("Heun on EDM's noise levels needs far fewer evaluations of one network (EDM, Table 3)", "VP network, 256 to 35 evaluations: 2.85 to 2.93 FID",
        f"Frechet {one['frechet']} in {one['evaluations']}, {two['frechet']} in {two['evaluations']}")


main = script(edm_samplers, __doc__)

if __name__ == "__main__":
    command(main)
