"""PDM's other finding: which training target and weight are robust.   python experiments/pdm_targets.py

Trains x, eps and v, and for x the weights 1, sqrt_snr and snr, with and without patches, all alike; writes the error of the
x_0-prediction by noise level, the Frechet distance where --features is given, and a grid of samples for each.
"""
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
import train
from edm import denoiser
from evaluate import Features, errors, frechet_distance, load_like, moments
from sample import draw
from train import Parser, add_flags, command, hold_out, load

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
    out, rows = Path(out), []
    if features and not Path(features).is_file():
        raise ValueError(f"no such file: {features}")
    for P in patches:
        for target, weight in CASES:
            run = out / f"{Path(data).stem}-{size}-P{P}-{target}-{weight}"
            if not (run / "ckpt.pt").exists():
                train.main([*f"--method pdm --patch {P} --predict {target} --weight {weight} --size {size} --steps {steps} --every {steps} "
                            "--grid 16 --data".split(), data, "--out", str(run)] + (["--device", device] if device else []))
            method, checkpoint = load(run / "ckpt.pt", device=device)
            if checkpoint["step"] != steps or checkpoint["config"]["data"] != data:
                raise ValueError(f"{run} has {checkpoint['step']} steps on {checkpoint['config']['data']}, not {steps} on {data}: another --out")
            where = next(method.parameters()).device
            (x, _), held = hold_out(*load_like(checkpoint, data), 0)
            row = dict(P=P, predict=target, weight=weight)
            for level in errors(denoiser(method), (x[:2000], None), (pixels.to_float(held[0]), None), 64, 0, where, run / "error.csv"):
                row[f"rmse_{level['sigma']:g}"] = round(level["held_out"], 4)
            samples = draw(lambda *a, **k: method.sample(*a, steps=str(chain), **k), checkpoint["shape"], [(0, i) for i in range(n)], 64, None, where)
            pixels.save_grid(samples[:64], out / f"{run.name}.png")
            if features:
                network = Features(features, checkpoint["shape"], where)
                row["frechet"] = round(frechet_distance(*moments(network(pixels.to_uint8(samples), 64)), *network.statistics(x, data, 256)), 2)
            rows.append(row)
    name = out / f"pdm_targets-{Path(data).stem}-{size}.csv"
    with open(name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(*rows[0], sep=" | ")
    for row in rows:
        print(*row.values(), sep=" | ")
    print(f"wrote {name}; features: {features}, {n} samples in {chain} steps")


def main(argv):
    parser = Parser(prog="pdm_targets.py", description=__doc__)
    add_flags(parser, "pdm_targets", pdm_targets)
    pdm_targets(**parser.parse(argv, "pdm_targets"))


if __name__ == "__main__":
    command(main)
