"""Improved DDPM's claim on short chains: with a learned variance few steps lose little; with a fixed one they do (Fig. 8).

    python experiments/iddpm_steps.py --quick                       # trains both networks first
    python experiments/iddpm_steps.py runs/hybrid/ckpt.pt runs/simple/ckpt.pt --quick

Draws from the first by its learned variance, from the second by both fixed ones (beta, beta_tilde) and by DDIM, in 10 to 100 steps (without --quick 25 to 1000); writes a table, a plot if
matplotlib is there, and a grid.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, script
from common import Score, check, claim, run_once, three_levels


def iddpm_steps(learned=None, fixed=None, *,
                features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                quick: bool = False,           # 128 images of each, at most 100 steps and networks of 16x16, for two CPU cores
                data: str = "digits",          # where no checkpoints are given: what train.py's --data takes,
                size: int | None = None,       # image size; default 32, quick 16,
                train_steps: int | None = None,  # and training steps of each; default 25,000, quick 2,000
                n: int | None = None,          # images of each; default 1,000, quick 128
                seeds: int = 3,                # times that each is drawn; their mean and spread count
                batch: int | None = None,      # images at a time; default 64, on CUDA 500
                out: str = "runs/iddpm-steps", # folder of iddpm_steps.csv, .png and the grid
                device: str | None = None):    # cuda, mps or cpu
    """Draw, measure, write. Raises ValueError for checkpoints of another kind."""
    n, chains = n or (128 if quick else 1000), (10, 25, 50, 100) if quick else (25, 50, 100, 200, 400, 1000)
    check(features)
    if (learned is None) != (fixed is None):
        raise ValueError("two checkpoints are compared, one of a learned variance and one of a fixed; or none is given, and both are trained")
    if learned is None:
        size = size or (16 if quick else 32)
        flags, train_steps = f"--method iddpm --size {size} {three_levels(size)} --objective", train_steps or (2000 if quick else 25_000)
        learned, fixed = (run_once(Path(out) / f"{objective}-{Path(data).stem}-{size}", f"{flags} {objective}", data, train_steps, device) for objective in ("hybrid", "simple"))
    one, two = Score(learned, features, n, seeds, device, batch), Score(fixed, features, n, seeds, device, batch)
    if not getattr(one.method, "learned", False) or getattr(two.method, "learned", True):
        raise ValueError(f"{learned} must have a learned variance (iddpm --objective hybrid or vlb), {fixed} a fixed one (iddpm --objective simple)")

    chains = [k for k in chains if k <= min(one.method.T, two.method.T)]
    if not chains:
        raise ValueError(f"{learned} and {fixed} have too few steps to leave any out")

    def with_variance(name):
        def sampler(noise, y=None, **options):
            two.method.variance = name
            return two.method.sample(noise, y, **options)
        return sampler
    cases = [("learned", k, one.method.sample, dict(steps=str(k)), one) for k in chains]
    cases += [(f"fixed, {name}", k, with_variance(variance), dict(steps=str(k))) for name, variance in (("beta", "large"), ("beta_tilde", "small")) for k in chains]
    cases += [("DDIM", k, two.method.sample, dict(steps=str(k), eta=0.0)) for k in chains]
    found = {(line["sampler"], line["steps"]): line.get("frechet") for line in two.table(cases, Path(out) / "iddpm_steps.csv", "steps")}
    claim("few steps cost little with a learned variance (Improved DDPM, Fig. 8)", "100 of 4000 steps: near the full chain's FID; fixed variances fall behind",
        "; ".join(f"{k} steps: " + ", ".join(f"{name} {found[name, k]}" for name in ("learned", "fixed, beta", "fixed, beta_tilde", "DDIM")) for k in (chains[0], chains[-1])))


main = script(iddpm_steps, __doc__)

if __name__ == "__main__":
    command(main)
