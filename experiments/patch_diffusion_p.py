"""Patch Diffusion's claim: crops make training about twice as fast at no cost in quality, if some steps see whole images.

    python experiments/patch_diffusion_p.py --quick

Trains p = 0, .1, .25, .5, .75 and 1 alike, p = .5 with progressive sizes too, and p = .5 and 1 on a small part of the data; writes the seconds of training, the error by
noise level, the Frechet distance and a grid for each. (Not called patch_diffusion.py: it would hide the paper's file.)
"""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, script
from common import claim, plot, trained, write


def patch_diffusion_p(*,
                      quick: bool = False,        # 16x16 and 600 steps of each, for two CPU cores
                      data: str = "digits",       # or what train.py's --data takes
                      size: int | None = None,    # image size; default 32, quick 16
                      steps: int | None = None,   # training steps of each; default 10,000, quick 600
                      batch: int | None = None,   # whole images a step; default 256, which is to fill a GPU, quick 32
                      small: int = 500,           # images of the small data set
                      n: int | None = None,       # samples for the Frechet distance and the grid; default 2,000, quick 128
                      features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                      out: str = "runs/patch-diffusion-p",  # folder of the runs and the table
                      device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    batch = batch or (32 if quick else 256)
    steps, size, n = steps or (600 if quick else 10_000), size or (16 if quick else 32), n or (128 if quick else 2000)
    out, stem, rows, pictures = Path(out), f"{Path(data).stem}-{size}", [], []
    cases = [(p, "stochastic", 0) for p in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)] + [(0.5, "progressive", 0), (0.5, "stochastic", small), (1.0, "stochastic", small)]
    for p, sizes, some in cases:
        run = out / f"{stem}-p{p}-{sizes}-{some or 'all'}"
        found, x = trained(run, f"--method patch_diffusion --p_full {p} --sizes {sizes} --overfit {some} --P_mean 0 --batch {batch}", data, size, steps, n, 18, features, device)
        seconds = float(list(csv.DictReader(open(run / "log.csv")))[-1]["seconds"])
        rows.append(dict(p=p, sizes=sizes, images=some or "all", seconds=round(seconds, 1)) | found)
        pictures.append(x)
    write(out / f"patch_diffusion_p-{stem}.csv", rows, f"{data}, {steps} steps, {n} samples by Heun in 18 steps", pictures, 3)
    if "frechet" in rows[0]:
        plot(out / f"shares-{stem}.png", [row | dict(trained_on=f"{row['sizes']}, {row['images']} images") for row in rows], "p", "frechet", "trained_on", "spread", log="")
    half, one = rows[3], rows[5]
    claim("crops make training twice as fast at no cost in quality (Patch Diffusion)", "p = .5: half the time, FID as good",
        f"{one['seconds'] / max(half['seconds'], 0.1):.2f}x; Frechet {half.get('frechet')} for p = .5, {one.get('frechet')} for p = 1")


main = script(patch_diffusion_p, __doc__)

if __name__ == "__main__":
    command(main)
