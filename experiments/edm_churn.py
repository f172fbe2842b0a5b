"""EDM's claim on stochastic sampling: Algorithm 2 corrects errors, and does so better than a general SDE solver (Sec. 4, Figs. 4 and 5).

    python experiments/edm_churn.py                                             # a mixture whose score is known, in a minute
    python experiments/edm_churn.py runs/edm/ckpt.pt --quick      # and a trained network

On the mixture: the distance of samples to the truth for Euler-Maruyama on EDM's SDE (Eq. 6 with beta = sigma_dot / sigma) and for Algorithm 2, at equal
evaluations, with the exact denoiser and with one that errs as a network does (it removes slightly too much noise, Sec. 4).
"""
import functools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, ode_sample, sigma_steps
from common import Score, claim, plot, write
from train import command, script

WEIGHTS, MEANS, S = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64), 0.08


class Mixture:
    """The exact denoiser of a mixture of three Gaussians, every pixel alike; `error` removes so much of the noise too much (at sigma < 1, sigma times as much)."""
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, error=0.0):
        self.error = error

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, y=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        variance = S ** 2 + sigma ** 2
        w = (WEIGHTS.log() - (x[..., None] - MEANS).square() / (2 * variance[..., None])).softmax(-1)
        D = (w * (MEANS + S ** 2 / variance[..., None] * (x[..., None] - MEANS))).sum(-1)
        return D + self.error * (D - x) * sigma.clamp(max=1)


def euler_maruyama(D, noise, y=None, *, steps, randn_like=torch.randn_like):
    """EDM Eq. 6 with beta(t) = 1 / t on EDM's noise levels: dx = -2 t score dt + sqrt(2 t) dw, score = (D - x) / t^2."""
    t = torch.cat([sigma_steps(steps), torch.zeros(1, dtype=torch.float64)])
    x = t[0] * noise.double()
    for i in range(steps):
        denoised, h = D(x, t[i]), t[i] - t[i + 1]
        x = x + 2 * h * (denoised - x) / t[i] + ((2 * t[i] * h).sqrt() * randn_like(x) if t[i + 1] > 0 else 0)
        yield x, denoised


def distance(x, truth):
    """Wasserstein-1 between two samples of one number."""
    return (x.flatten().sort()[0] - truth.flatten().sort()[0]).abs().mean().item()


def edm_churn(path=None, *,
              features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
              quick: bool = False,         # fewer images, for two CPU cores
              n: int | None = None,        # samples of the mixture; default 50,000, quick 10,000
              seeds: int = 3,              # times that each is drawn
              out: str = "runs/edm-churn", # folder of the tables
              device: str | None = None):  # cuda, mps or cpu, for the network
    """Write mixture.csv, and churn.csv with a grid where a checkpoint is given."""
    rows, out = [], Path(out)
    score = Score(path, features, 64 if quick else 2000, seeds, 64, device) if path is not None else None
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    n = n or (10_000 if quick else 50_000)
    truth = MEANS[torch.multinomial(WEIGHTS, n, replacement=True)] + S * torch.randn(n, dtype=torch.float64)
    again = MEANS[torch.multinomial(WEIGHTS, n, replacement=True)] + S * torch.randn(n, dtype=torch.float64)
    print(f"two samples of the truth: {distance(again, truth):.5f}")
    for error in (0.0, 0.05):
        for evaluations in (35, 79, 159):
            steps = (evaluations + 1) // 2
            row = dict(error=error, evaluations=evaluations)
            for name, sampler, options in [("euler_maruyama", euler_maruyama, dict(steps=evaluations))] + [
                    (f"algorithm_2_churn_{share:g}", ode_sample, dict(steps=steps, S_churn=share * steps)) for share in (0, 0.1, 0.2, math.sqrt(2) - 1)]:
                for x, _ in sampler(Mixture(error), torch.randn(n, 1, 1, 1, dtype=torch.float64), **options):
                    pass
                row[name] = round(distance(x, truth), 5)
            rows.append(row)
    write(out / "mixture.csv", rows, f"{n} samples, Wasserstein-1 distance; S_churn as a share of the steps, .41 is the most that Algorithm 2 adds")
    plot(out / "mixture.png", [dict(case=f"{name}, error {row['error']:g}", evaluations=row["evaluations"], distance=value) for row in sorted(rows, key=lambda row: row["error"])
                               for name, value in list(row.items())[2:]], "evaluations", "distance", "case", log="xy")
    claim("churn removes a denoiser's errors (EDM, Sec. 4)", "", f"5% error, {evaluations} evaluations: {rows[-1]['algorithm_2_churn_0']} by the ODE, "
        f"{rows[-1]['algorithm_2_churn_0.414214']} with churn, {rows[-1]['euler_maruyama']} by Euler-Maruyama")
    if score:
        ode, steps = functools.partial(ode_sample, denoiser(score.method)), 32
        score.table([(f"S_churn {churn}, S_noise {noise}", steps, ode, dict(steps=steps, S_churn=churn, S_noise=noise)) for churn, noise in ((0, 1.0), (5, 1.003), (10, 1.003), (20, 1.0), (20, 1.003))],
                    out / "churn.csv", "evaluations")


main = script(edm_churn, __doc__)

if __name__ == "__main__":
    command(main)
