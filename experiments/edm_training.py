"""EDM's claim on training: each of its parts helps (Table 2, C to F).

    python experiments/edm_training.py --quick

Trains four networks alike: VP's preconditioning, noise levels and weight; EDM's preconditioning; EDM's noise levels and weight too; and augmentation. All are drawn by
Heun on EDM's noise levels, so that only training differs. Writes the error by noise level, the Frechet distance and a grid for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import command, script
from common import claim, three_levels, trained, write

LADDER = {"VP": "--precond vp", "EDM preconditioning": "--precond edm --p_train vp --weight vp", "EDM loss": "--precond edm --P_mean {P_mean}",
          "augmentation": "--precond edm --P_mean {P_mean} --augment 0.12"}


def edm_training(*,
                 quick: bool = False,        # 16x16 and 1,000 steps of each, for two CPU cores
                 data: str = "digits",       # or what train.py's --data takes
                 size: int | None = None,    # image size; default 32, quick 16
                 steps: int | None = None,   # training steps of 32 images for each; default 20,000, quick 1,000
                 P_mean: float = 0.0,        # centre of ln(sigma) in EDM's loss; the paper's -1.2 suits long runs
                 n: int | None = None,       # samples for the Frechet distance and the grid; default 2,000, quick 128
                 features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                 out: str = "runs/edm-training",  # folder of the runs and the table
                 device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    steps, size, n = steps or (1000 if quick else 20_000), size or (16 if quick else 32), n or (128 if quick else 2000)
    out, stem, rows, pictures = Path(out), f"{Path(data).stem}-{size}", [], []
    for k, (name, flags) in enumerate(LADDER.items()):
        found, x = trained(out / f"{stem}-{k}", f"--method edm {three_levels(size)} {flags.format(P_mean=P_mean)}", data, size, steps, n, 18, features, device)
        rows.append(dict(training=name) | found)
        pictures.append(x)
    write(out / f"edm_training-{stem}.csv", rows, f"{data}, {steps} steps of 32 images, {n} samples by Heun in 18 steps", pictures, 1)
    claim("each part of EDM's training helps (EDM, Table 2, C to F)", "VP, CIFAR-10: FID 2.31, 2.29, 2.05, 1.97", "Frechet " + ", ".join(f"{line['training']} {line.get('frechet')}" for line in rows))


main = script(edm_training, __doc__)

if __name__ == "__main__":
    command(main)
