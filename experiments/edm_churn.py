"""EDM's claim on stochastic sampling: Algorithm 2 corrects errors, and does so better than a general SDE solver (Sec. 4, Figs. 4 and 5).

    python experiments/edm_churn.py --no-network                  # a mixture whose score is known, in a minute
    python experiments/edm_churn.py --quick                       # and a network, which is trained first
    python experiments/edm_churn.py runs/edm/ckpt.pt --quick      # or this one

On the mixture: the distance of samples to the truth for Euler-Maruyama on EDM's SDE (Eq. 6 with beta = sigma_dot / sigma) and for Algorithm 2, at equal
evaluations, with the exact denoiser and with one that errs as a network does (it removes slightly too much noise, Sec. 4). On the network: the same samplers, and
S_churn and S_noise, by Frechet distance.
"""
import functools
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser, level, noise_range, ode_sample, sigma_steps
from common import Score, check, claim, plot, run_once, three_levels, write
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


@torch.no_grad()
def euler_maruyama(D, noise, y=None, *, steps, randn_like=torch.randn_like):
    """EDM Eq. 6 with beta(t) = 1 / t on EDM's noise levels: dx = -2 t score dt + sqrt(2 t) dw, score = (D - x) / t^2."""
    levels = sigma_steps(steps, "edm", *noise_range("edm", None, None, D))
    x = levels[0].item() * noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)
    for sigma, t, t_next in zip(levels, levels.tolist(), levels.tolist()[1:] + [0.0]):
        denoised, h, z = D(x, level(sigma, x), y), t - t_next, randn_like(x)
        x = x + 2 * h * (denoised - x) / t + (math.sqrt(2 * t * h) * z if t_next > 0 else 0)
        yield x.to(noise.dtype), denoised.to(noise.dtype)


def distance(x, truth):
    """Wasserstein-1 between two samples of one number."""
    return (x.flatten().sort()[0] - truth.flatten().sort()[0]).abs().mean().item()


def edm_churn(path=None, *,
              features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
              quick: bool = False,         # 16x16, 1,500 steps and fewer images, for two CPU cores
              network: bool = True,        # --no-network: the mixture alone
              data: str = "digits",        # where no checkpoint is given: what train.py's --data takes,
              size: int | None = None,     # image size; default 32, quick 16,
              train_steps: int | None = None,  # and training steps; default 30,000, quick 1,500
              images: int | None = None,   # images of each sampler; default 2,000, quick 128
              n: int | None = None,        # samples of the mixture; default 50,000, quick 10,000
              seeds: int = 3,              # times that each is drawn
              out: str = "runs/edm-churn", # folder of the tables
              device: str | None = None):  # cuda, mps or cpu, for the network
    """Write mixture.csv, and churn.csv with a grid of the network's images."""
    rows, out, size = [], Path(out), size or (16 if quick else 32)
    check(features)
    if network:
        path = path or run_once(out / f"edm-{Path(data).stem}-{size}", f"--method edm --size {size} {three_levels(size)}", data, train_steps or (1500 if quick else 30_000), device)
        score = Score(path, features, images or (128 if quick else 2000), seeds, device)
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
                found = []
                for _ in range(seeds):
                    for x, _ in sampler(Mixture(error), torch.randn(n, 1, 1, 1, dtype=torch.float64), **options):
                        pass
                    found.append(distance(x, truth))
                row[name] = round(statistics.mean(found), 5)
            rows.append(row)
    write(out / "mixture.csv", rows, f"{n} samples, Wasserstein-1 distance, mean of {seeds} seeds; S_churn as a share of the steps, .41 is the most that Algorithm 2 adds")
    plot(out / "mixture.png", [dict(case=f"{name}, error {row['error']:g}", evaluations=row["evaluations"], distance=value) for row in sorted(rows, key=lambda row: row["error"])
                               for name, value in list(row.items())[2:]], "evaluations", "distance", "case", log="xy")
    claim("churn removes a denoiser's errors (EDM, Sec. 4)", "", f"5% error, {evaluations} evaluations: {rows[-1]['algorithm_2_churn_0']} by the ODE, "
        f"{rows[-1]['algorithm_2_churn_0.414214']} with churn, {rows[-1]['euler_maruyama']} by Euler-Maruyama")
    if network:
        D, steps = denoiser(score.method), 32
        cases = [("Euler-Maruyama", 2 * steps - 1, functools.partial(euler_maruyama, D), dict(steps=2 * steps - 1))]
        cases += [(f"S_churn {churn}, S_noise {noise}", steps, functools.partial(ode_sample, D), dict(steps=steps, S_churn=churn, S_noise=noise))
                  for churn, noise in ((0, 1.0), (5, 1.003), (10, 1.003), (20, 1.0), (20, 1.003))]
        found = [line.get("frechet") for line in score.table(cases, out / "churn.csv", "evaluations")]
        claim("and a network's", "", f"Frechet in 63 evaluations: {found[1]} by the ODE, {found[2:]} with churn, {found[0]} by Euler-Maruyama")


main = script(edm_churn, __doc__)

if __name__ == "__main__":
    command(main)
