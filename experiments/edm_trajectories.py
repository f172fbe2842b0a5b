"""EDM's claim on schedules: with sigma(t) = t the ODE's paths are nearly straight (Fig. 3).

    python experiments/edm_trajectories.py

Draws them for a mixture of Gaussians in the plane, whose denoiser is known (mixture.py): above
one coordinate against t, below the plane. Dots are Euler's steps, at the same noise levels.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import Path as Schedule
from edm import ode_sample, sigma_steps
from experiments.common import check_counts
from experiments.mixture import Mixture, draw
from experiments.report import claim
from plumbing.drawing import check_range, prepare
from plumbing.flags import run, script

LOW = 0.02
HIGH = 25.0
FINE = 400  # steps of Heun, whose path passes for the exact one
CASES = [
    ("vp", "vp", r"VP: $s = 1 / \sqrt{1 + \sigma^2}$"),
    ("ve", "none", r"VE: $\sigma = \sqrt{t}$, $s = 1$"),
    ("linear", "none", r"EDM: $\sigma = t$, $s = 1$"),
]
GRAY = 30  # paths without Euler's steps
COLOURS = ("#b0432b", "#2b6cb0", "#2f855a", "#b7791f")  # of paths with them


def edm_trajectories(
    *,
    steps: int = 10,  # Euler's
    n: int = 2000,  # paths that are measured; the first of them are drawn
    seed: int = 3,  # of their noise
    out: str = "edm-trajectories.png",  # the picture
):
    """Draw it, and print how far from the ends of the paths Euler ends in each column."""
    check_counts(len(COLOURS), steps=steps, n=n)
    check_range("seed", seed, 0, 2**63)
    prepare(out, ".png", named=True)
    torch.manual_seed(seed)
    noise = torch.randn(n, 1, 1, 2, dtype=torch.float64)
    columns = []
    errors = []
    for schedule, scaling, title in CASES:
        exact = walk(noise, FINE, "heun", schedule, scaling)
        euler = walk(noise, steps, "euler", schedule, scaling)
        columns.append((title, *exact, *euler))
        error = (euler[1][-1] - exact[1][-1]).norm(dim=1).mean()
        errors.append(f"{title.split(':')[0]} {error:.2g}")
    draw_columns(columns, out)
    ours = f"Euler in {steps} steps ends off the path by {', '.join(errors)}"
    claim("paths of the ODE by schedule (EDM, Fig. 3)", "", ours, "")


def walk(noise, steps, solver, schedule, scaling):
    """Times (N + 1,) and places (N + 1, n, 2) along the ODE, from the noise level HIGH on."""
    path = Schedule(schedule, scaling, LOW, HIGH)
    t = path.t(sigma_steps(steps, "edm", LOW, HIGH))
    places = [HIGH * path.s(t[0]) * noise]
    options = dict(schedule=schedule, scaling=scaling, sigma_min=LOW, sigma_max=HIGH)
    for x, _ in ode_sample(Mixture(), noise, steps=steps, solver=solver, **options):
        places.append(x)
    return torch.cat([t, t.new_zeros(1)]), torch.stack(places)[:, :, 0, 0]


def draw_columns(columns, out):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {out}: matplotlib is not installed")
        return
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    panels = zip(*figure.subplots(2, 3))
    for (above, below), (title, t, x, t_euler, x_euler) in zip(panels, columns):
        below.plot(*draw(4000).view(2, 2000), ",", color="0.6")
        draw_paths(above, below, t, x[:, :GRAY], color="0.8", linewidth=0.6)
        for k, color in enumerate(COLOURS):
            draw_paths(above, below, t, x[:, k], color=color, linewidth=1)
            draw_paths(above, below, t_euler, x_euler[:, k], color=color, marker="o", ls=":")
        above.set(title=title, xlabel="t", ylabel="first coordinate")
        below.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    figure.savefig(out, dpi=80)
    print(f"wrote {out}")


def draw_paths(above, below, t, x, **style):
    above.plot(t, x[..., 0], markersize=4, **style)
    below.plot(x[..., 0], x[..., 1], markersize=4, **style)


main = script(edm_trajectories, __doc__)

if __name__ == "__main__":
    run(main)
