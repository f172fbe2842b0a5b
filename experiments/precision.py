"""Does bfloat16 cost anything that can be seen?   python experiments/precision.py

Trains the same run, same seed and same images, in fp32 and in bf16, and once more in fp32 with another seed, which says how much is chance. Writes the losses
along the way, the error by noise level, the Frechet distance and a grid. Slow where the hardware does not multiply in bfloat16.
"""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, script
from common import claim, plot, trained, write

CASES = {"fp32": "--precision fp32", "bf16": "--precision bf16", "fp32, another seed": "--precision fp32 --seed 1"}


def precision(*,
              quick: bool = False,        # 16x16 images, a small network and 600 steps, for CPUs that emulate bf16
              method: str = "pdm",        # as in train.py
              flags: str = "",            # more of train.py's flags, in quotes
              data: str = "digits",       # or what train.py's --data takes
              size: int | None = None,    # image size; default 32, quick 16
              steps: int | None = None,   # training steps of 32 images for each; default 6,000, quick 600
              n: int = 256,               # samples for the Frechet distance and the grid
              chain: int = 50,            # sampling steps
              features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
              out: str = "runs/precision",  # folder of the runs, precision.csv, losses.csv and the grid
              device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the tables. A run that is there already is used as it is."""
    out, steps, size, rows, pictures, losses = Path(out), steps or (600 if quick else 6000), size or (16 if quick else 32), [], [], []
    flags = f"--method {method} {'--width 32 --patch 2' if quick and method == 'pdm' else ''} {flags} --every {max(1, steps // 20)}"
    for name, own in CASES.items():
        run = out / name.replace(", ", "-").replace(" ", "-")
        found, x = trained(run, f"{flags} {own}", data, size, steps, n, chain, features, device)
        rows.append(dict(precision=name) | found)
        pictures.append(x)
        losses += [dict(precision=name, step=int(row["step"]), loss=float(row["loss"])) for row in csv.DictReader(open(run / "log.csv"))]
    write(out / "precision.csv", rows, f"{method}, {data}, {steps} steps of 32 images, {n} samples in {chain} steps", pictures, 1)
    write(out / "losses.csv", losses, "the mean loss since the row before")
    plot(out / "losses.png", losses, "step", "loss", "precision", log="")
    a, b, c = ([row["loss"] for row in losses if row["precision"] == name] for name in CASES)
    apart = lambda x, y: sum(abs(p - q) / p for p, q in zip(x, y)) / len(x)
    claim("bf16 costs nothing that can be seen", "", f"losses {apart(a, b):.2%} apart, those of two seeds {apart(a, c):.2%}; "
          + "Frechet " + ", ".join(f"{row['precision']} {row.get('frechet')}" for row in rows))


main = script(precision, __doc__)

if __name__ == "__main__":
    command(main)
