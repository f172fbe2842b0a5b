"""PDM's other finding: which training target and weight are robust.

    python experiments/pdm_targets.py --quick

Trains x, eps and v, and for x the weights 1, sqrt_snr and snr, with and without patches, all alike; writes the error of the
x_0-prediction by noise level, the Frechet distance on features of the data, and a grid of samples for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import claim, trained, write
from train import command, script

CASES = [("x", "sqrt_snr"), ("x", "1"), ("x", "snr"), ("v", "sqrt_snr"), ("eps", "sqrt_snr"), ("eps", "snr")]


def pdm_targets(*,
                quick: bool = False,        # 16x16 and 250 steps of each, for two CPU cores
                data: str = "digits",       # digits, or what train.py's --data takes
                size: int | None = None,    # image size; default 32, quick 16
                patches: tuple[int, ...] = (1, 4),  # patch sizes
                schedule: str = "linear",   # the paper's, or cosine: there sqrt(SNR) weighs eps's error 130 times more at t = T
                steps: int | None = None,   # training steps of 32 images for each; default 5,000, quick 250
                n: int | None = None,       # samples for the Frechet distance and the grid; default 1,000, quick 128
                chain: int = 50,            # sampling steps
                features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                out: str = "runs/pdm-targets",  # folder of the runs, pdm_targets.csv and the grids
                device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    steps, size, n = steps or (250 if quick else 5000), size or (16 if quick else 32), n or (128 if quick else 1000)
    out, rows, pictures = Path(out), [], []
    for P in patches:
        for target, weight in CASES:
            run = out / f"{Path(data).stem}-{size}-P{P}-{target}-{weight}-{schedule}"
            found, x = trained(run, f"--method pdm --patch {P} --predict {target} --weight {weight} --schedule {schedule}", data, size, steps, n, chain, features, device)
            rows.append(dict(P=P, predict=target, weight=weight) | found)
            pictures.append(x)
    write(out / f"pdm_targets-{Path(data).stem}-{size}-{schedule}.csv", rows, f"{n} samples in {chain} steps", pictures, 3)
    best = {}                                                     # of each target's weights
    for line in sorted(rows, key=lambda line: line.get("frechet", 0)):
        best.setdefault((line["P"], line["predict"]), f"{line.get('frechet')} ({line['weight']})")
    claim("x and v are robust targets, eps is not, least of all with patches (PDM)", "", "Frechet, best weight: " + ", ".join(f"P = {P} {name} {found}" for (P, name), found in sorted(best.items())))


main = script(pdm_targets, __doc__)

if __name__ == "__main__":
    command(main)
