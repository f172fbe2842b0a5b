"""PDM's evidence: how patch sizes compare.

    python experiments/pdm_patches.py --quick

Trains P = 1, 2, 4, 8 alike (same U-Net, same images), then measures for each: error of the x_0-prediction against the noise
level (the curves should part only at low noise), seconds a training step, seconds and peak memory of a sample, Frechet
distance on features of the data, and a grid. --speed only times untrained networks, for sizes too large to train here.
"""
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from train import build, command, flags_of, pick_device, script, to_device
from unet import UNet
from common import check, claim, trained, write


def pdm_patches(*,
                quick: bool = False,        # 16x16 and 800 steps of each, for two CPU cores
                data: str = "digits",       # digits, or what train.py's --data takes
                size: int | None = None,    # image size; default 32, quick 16
                patches: tuple[int, ...] = (1, 2, 4, 8),  # patch sizes to compare
                steps: int | None = None,   # training steps of 32 images for each; default 10,000, quick 800
                n: int | None = None,       # samples for the Frechet distance and the grid; default 2,000, quick 128
                chain: int = 50,            # sampling steps
                batch: int | None = None,   # images at a time where speed and memory are measured; default 256, which is to fill a GPU, quick and --speed 16
                repeats: int = 5,           # timings, interleaved; the median counts
                features: str | None = None,  # TorchScript file for the Frechet distance; default: one trained on the data's classes; none: no distance
                speed: bool = False,        # only time and weigh untrained networks
                out: str = "runs/pdm-patches",  # folder of the runs, pdm_patches.csv and the grids
                device: str | None = None): # cuda, mps or cpu
    """Train, measure, write the table. A run that is there already is used as it is."""
    out, steps, size, n = Path(out), steps or (800 if quick else 10_000), size or (16 if quick else 32), n or (128 if quick else 2000)
    batch = batch or (16 if quick or speed else 256)
    check(features)
    rows, pictures = {P: dict(P=P) | cost for P, cost in costs(size, patches, batch, repeats, device).items()}, []
    for P in patches if not speed else ():
        found, x = trained(out / f"{Path(data).stem}-{size}-P{P}", f"--method pdm --patch {P}", data, size, steps, n, chain, features, device)
        rows[P] |= found
        pictures.append(x)
    out.mkdir(parents=True, exist_ok=True)
    name = out / f"pdm_patches-{Path(data).stem}-{size}{'-speed' if speed else ''}.csv"
    write(name, list(rows.values()), f"{n} samples in {chain} steps", pictures, 1)
    first, last = rows[patches[0]], rows[4 if 4 in rows else patches[-1]]
    claim("patches cost P^2 times less, and differ in error at low noise only (PDM)", f"{(last['P'] / first['P']) ** 2:g}x",
        f"P = {last['P']} against {first['P']}: sampling {last['speedup']}x, memory {last['memory_ratio']}; Frechet {last.get('frechet')} and {first.get('frechet')}")


def network(P, size, device):
    config = dict(patch=P, **{name: p.default for name, (p, _) in flags_of(UNet).items()})
    return to_device(build(dict(method="pdm", config=config, shape=[3, size, size], classes=[])), device)


def costs(size, patches, batch, repeats, device):
    """{P: seconds a training step (forward and backward), milliseconds an image and sampling step, peak memory of a sampling step}."""
    device = pick_device(device)
    methods = {P: network(P, size, device) for P in patches}
    x = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    step, call = {P: [] for P in patches}, {P: [] for P in patches}

    def timed(function):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    for _ in range(repeats):
        for P, method in methods.items():
            if size <= 64 or P >= 4:
                step[P].append(timed(lambda: method.loss(x).backward()))
            call[P].append(timed(lambda: list(method.sample(x, steps="2"))) / 2)
    memory = {P: peak(P, size, batch, device) for P in patches}
    return {P: dict(train_step_s=round(statistics.median(step[P]), 4) if step[P] else None, sample_step_ms_an_image=round(1000 * statistics.median(call[P]) / batch, 3),
                    speedup=round(statistics.median(call[patches[0]]) / statistics.median(call[P]), 2),
                    peak_mb=round(memory[P], 1), memory_ratio=round(memory[P] / memory[patches[0]], 3)) for P in patches}


def peak(P, size, batch, device):
    """Megabytes that a sampling step needs at once beyond the weights and the images; on a CPU in a process of its own."""
    if device.type != "cuda":
        if not Path("/proc/self/clear_refs").exists():
            return math.nan
        line = [sys.executable, __file__, "--weigh", json.dumps([P, size, batch])]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"weighing P = {P} failed: {done.stderr.strip().splitlines()[-1]}")
        return float(done.stdout)
    method, x = network(P, size, device), torch.rand(batch, 3, size, size, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    list(method.sample(x, steps="2"))
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def weigh(P, size, batch):
    """Print the megabytes by which this process grows at most during a sampling step (Linux)."""
    def kilobytes(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
    torch.set_num_threads(1)
    method, x = network(P, size, torch.device("cpu")), torch.rand(batch, 3, size, size)
    list(method.sample(x[:1], steps="2"))                        # whatever is set up once
    Path("/proc/self/clear_refs").write_text("5")                      # the high-water mark starts anew
    before = kilobytes("VmRSS")
    list(method.sample(x, steps="2"))
    print((kilobytes("VmHWM") - before) / 1e3)


def main(argv):
    if argv[:1] == ["--weigh"]:
        return weigh(*json.loads(argv[1]))
    script(pdm_patches, __doc__)(argv)


if __name__ == "__main__":
    command(main)
