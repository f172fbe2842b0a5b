"""PDM's other finding: which training target and weight are robust.   python experiments/pdm_targets.py

Trains x, eps and v, and for x the weights 1, sqrt_snr and snr, with and without patches, all alike; writes the error of the
x_0-prediction by noise level, the Frechet distance where --features is given, and a grid of samples for each.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import claim, trained, write
from train import command, script

CASES = [("x", "sqrt_snr"), ("x", "1"), ("x", "snr"), ("v", "sqrt_snr"), ("eps", "sqrt_snr"), ("eps", "snr")]


def pdm_targets(*,
                data: str = "digits",       # digits, or what train.py's --data takes
                size: int = 16,             # image size
                patches: tuple[int, ...] = (1, 4),  # patch sizes
                steps: int = 800,           # training steps of 32 images for each
                n: int = 256,               # samples for the Frechet distance and the grid
                chain: int = 50,            # sampling steps
                features: str | None = None,  # TorchScript file for the Frechet distance (experiments/features.py)
                out: str = "runs/pdm-targets",  # folder of the runs, pdm_targets.csv and the grids
                device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    out, rows, pictures = Path(out), [], []
    for P in patches:
        for target, weight in CASES:
            run = out / f"{Path(data).stem}-{size}-P{P}-{target}-{weight}"
            found, x = trained(run, f"--method pdm --patch {P} --predict {target} --weight {weight}", data, size, steps, n, chain, features, device)
            rows.append(dict(P=P, predict=target, weight=weight) | found)
            pictures.append(x)
    write(out / f"pdm_targets-{Path(data).stem}-{size}.csv", rows, f"features: {features}, {n} samples in {chain} steps", pictures, 3)
    claim("x and v are robust targets, eps is not, least of all with patches (PDM)", "", "Frechet " + ", ".join(
        f"P = {line['P']} {line['predict']} {line.get('frechet')}" for line in rows if line["weight"] == "sqrt_snr"))


main = script(pdm_targets, __doc__)

if __name__ == "__main__":
    command(main)
