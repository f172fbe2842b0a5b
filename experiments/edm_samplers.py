"""EDM's claim on samplers: the same quality from far fewer evaluations of one network that was trained as a DDPM (Fig. 2, Table 2 A to D).

    python experiments/features.py --data digits && python experiments/edm_samplers.py runs/ddpm/ckpt.pt --features digits-features.pt --quick

Draws from one checkpoint by the ancestral chain, DDIM, Euler and Heun, walks the ladder of Fig. 2 (Heun, then EDM's noise levels, then its schedule
and scaling), and varies rho; writes a table, a plot if matplotlib is there, and a grid with a row for each sampler.
"""
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import data as pixels
from edm import denoiser, ode_sample
from evaluate import Features, frechet_distance, load_like, moments
from pdm_patches import write
from sample import Cost, draw
from train import command, hold_out, load, script


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
    D, own = denoiser(score.method), score.method.sample
    ode = functools.partial(ode_sample, D)
    old = dict(discretization="vp", schedule="vp", scaling="vp")
    cases = [("ancestral", steps, own, dict(steps=steps)) for steps in ((100, 250) if quick else (50, 100, 250, 1000))]
    cases += [("DDIM", steps, own, dict(steps=steps, eta=0.0)) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Euler", steps, ode, dict(steps=steps, solver="euler")) for steps in ((18, 35) if quick else (10, 18, 35, 79))]
    cases += [("Heun", steps, ode, dict(steps=steps)) for steps in ((5, 9, 18) if quick else (5, 9, 18, 40))]
    cases += [(name, 18, ode, dict(steps=18) | options) for name, options in (
        ("ladder A: Euler, VP's levels, schedule, scaling", old | dict(solver="euler", steps=35)), ("ladder B: Heun", old),
        ("ladder C: EDM's levels", old | dict(discretization="edm")), ("ladder D: sigma = t, no scaling", {}))]
    cases += [(f"rho = {rho}", 18, ode, dict(steps=18, rho=rho)) for rho in (3, 5, 7, 9)]
    score.table(cases, Path(out) / "edm_samplers.csv", "evaluations")


class Score:
    """Frechet distance of what a sampler draws from one checkpoint, over several seeds."""

    def __init__(self, path, features, n, seeds, batch, device):
        if not Path(features).is_file():
            raise ValueError(f"no such file: {features}; experiments/features.py trains one")
        self.method, self.checkpoint = load(path, device=device)
        self.device, self.n, self.seeds, self.batch = next(self.method.parameters()).device, n, seeds, batch
        self.network, source = Features(features, self.checkpoint["shape"], self.device), self.checkpoint["config"]["data"]
        (x, self.y), _ = hold_out(*load_like(self.checkpoint, source), 0)
        self.statistics = self.network.statistics(x, source, 256)

    def __call__(self, sampler, options):
        """(distances by seed, evaluations an image, seconds an image, the first seed's images)."""
        distances, labels = [], torch.arange(self.n) % len(self.checkpoint["classes"]) if self.checkpoint["classes"] else None
        with Cost(self.method, self.n * self.seeds) as cost:
            for seed in range(self.seeds):
                x = draw(functools.partial(sampler, **options), self.checkpoint["shape"], [(seed, i) for i in range(self.n)], self.batch, labels, self.device)
                distances.append(frechet_distance(*moments(self.network(pixels.to_uint8(x), 256)), *self.statistics))
                first = x if seed == 0 else first
        return distances, cost.seen / cost.n, cost.seconds / cost.n, first

    def table(self, cases, path, axis):
        """Score [(name, steps, sampler, options), ...]; write a .csv, a .png against `axis` where matplotlib is, and a grid, a row a case."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, pictures = [], []
        for name, steps, sampler, options in cases:
            distances, evaluations, seconds, x = self(sampler, options)
            rows.append(dict(sampler=name, steps=steps, evaluations=round(evaluations), distance=round(statistics.mean(distances), 2),
                             spread=round(max(distances) - min(distances), 2), seconds=round(seconds, 3)))
            pictures.append(x[:8])
            print(*rows[-1].values(), sep=" | ", flush=True)
        write(path, rows, f"{self.n} images, mean and largest difference of {self.seeds} seeds, {self.network.name}, {self.device}")
        pixels.save_grid(torch.cat(pictures), path.with_name(f"{path.stem}-grid.png"), 8, [f"{row['sampler'][:24]} {row['evaluations']}" for row in rows])
        plot(path.with_suffix(".png"), rows, axis)


def plot(path, rows, axis):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print(f"no plot: matplotlib is not installed; the figures are in {path.with_suffix('.csv')}")
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == name]
        plt.errorbar([row[axis] for row in own], [row["distance"] for row in own], [row["spread"] / 2 for row in own], marker="o", label=name)
    plt.xscale("log"), plt.xlabel(axis), plt.ylabel("Frechet distance"), plt.legend(fontsize=7)
    plt.savefig(path, dpi=120)
    plt.close()


main = script(edm_samplers, __doc__)

if __name__ == "__main__":
    command(main)
