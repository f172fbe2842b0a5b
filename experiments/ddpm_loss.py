"""DDPM's claim: L_simple draws better images than the bound that it comes from, and codes them worse (Table 2); and what the chain decides when (Figs. 5, 6).

    python experiments/ddpm_loss.py --quick

Trains eps with L_simple and with the bound itself (Eq. 5, one random term a step) alike; writes bits/dim, Frechet distance and grids, and rate and
distortion along the chain (terms.csv, rate_distortion.png; bits/dim and RMSE of 255) and a strip of progressive generation.
"""
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from ddpm import DDPM
from evaluate import evaluate
from common import claim, plot, three_levels, trained, write
from sample import sample
from train import command, script


class Bound(DDPM):
    """DDPM trained on the variational bound."""

    def loss(self, x_0, y=None):
        t = torch.randint(1, self.T + 1, (len(x_0), 1, 1, 1), device=x_0.device)
        x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
        mean = self.q_posterior(self.x_0_hat(x_t, t, self.eps_theta(x_t, t, y)), x_t, t)[0]
        return (self.T * self.vlb_term(x_0, x_t, t, t - 1, mean, self.log_variance(t, t - 1, (1, 2)))).mean().to(x_0.dtype)   # Eq. 5


def ddpm_loss(*,
              quick: bool = False,        # 16x16, 2,000 steps of each, a bound over 250 steps and samples of 100, for two CPU cores
              data: str = "digits",       # or what train.py's --data takes
              size: int | None = None,    # image size; default 32, quick 16
              steps: int | None = None,   # training steps of 32 images for each; default 30,000, quick 2,000
              test: str | None = None,    # images for bits/dim; default those held out
              bound_n: int | None = None, # how many of them; default 128, quick 16
              n: int | None = None,       # samples for the Frechet distance and the grid; default 2,000, quick 128
              features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
              out: str = "runs/ddpm-loss",  # folder of the runs and tables
              device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    steps, size, n = steps or (2000 if quick else 30_000), size or (16 if quick else 32), n or (128 if quick else 2000)
    out, stem, rows, pictures, lossy = Path(out), f"{Path(data).stem}-{size}", [], [], []
    for loss, folder, cls in (("L_simple", "simple", DDPM), ("L, the bound", "bound", Bound)):
        run = out / f"{stem}-{folder}"
        train.METHODS["ddpm"] = cls                                           # the checkpoint is an ordinary DDPM's
        try:
            found, x = trained(run, f"--method ddpm {three_levels(size)}", data, size, steps, n, 100 if quick else 1000, features, device)
        finally:
            train.METHODS["ddpm"] = DDPM
        nll = evaluate(run / "ckpt.pt", dict(steps=250) if quick else {}, nll=True, n=bound_n or (16 if quick else 128), data=test, device=device)["nll"]
        rows.append(dict(loss=loss, bits_per_dim=round(nll["bits_per_dim"], 3), error=nll["standard_error"] and round(nll["standard_error"], 3)) | found)
        pictures.append(x)
        lossy += [dict(loss=loss, rate=float(row["rate"]), distortion=float(row["distortion"])) for row in csv.DictReader(open(run / "evaluation" / "terms.csv"))]
    sample(out / f"{stem}-simple" / "ckpt.pt", dict(steps=250), strip=True, n=4, out=str(out / "progressive-strip.png"), device=device)
    write(out / f"ddpm_loss-{stem}.csv", rows, f"{data}, {steps} steps", pictures, 1)
    plot(out / "rate_distortion.png", lossy, "rate", "distortion", "loss", log="")
    a, b = rows
    claim("L_simple draws better than the bound, and codes worse (DDPM, Tables 1 and 2)", "FID 3.17 and 13.51, bits/dim 3.75 and 3.70",
        f"Frechet {a.get('frechet')} and {b.get('frechet')}, bits/dim {a['bits_per_dim']} and {b['bits_per_dim']}")


main = script(ddpm_loss, __doc__)

if __name__ == "__main__":
    command(main)
