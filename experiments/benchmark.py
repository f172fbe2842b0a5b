"""How fast is it?   python experiments/benchmark.py

Times train.py itself, a plain reference step (the same network and loss in thirty ordinary lines: eager, fp32, no trick) and, where they are installed,
what people use instead; in turns, so that all see the same machine, and gives medians. Writes benchmark.txt and benchmark.json.

    python experiments/benchmark.py --methods ddpm pdm edm --precision fp32 bf16 --compile no yes
    python experiments/benchmark.py --growth                       # how cost grows with batch, size and width, as exponents
    python experiments/benchmark.py --peers --methods ddpm --width 64 --mults 1 2 2 2      # pip install denoising-diffusion-pytorch diffusers
"""
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from edm import denoiser
from train import METHODS, build, command, flags_of, pick_device, script, to_device
from unet import UNet


def benchmark(*,
              methods: tuple[str, ...] = ("ddpm", "pdm", "edm"),  # methods to time
              size: tuple[int, ...] = (32,),   # image sizes
              batch: tuple[int, ...] = (32,),  # images a step
              width: int | None = None,        # of the U-Net; default the method's
              mults: tuple[float, ...] = (),   # of the U-Net; default the method's
              attention: tuple[int, ...] = (), # of the U-Net; default the method's, as far as there are such levels
              precision: tuple[str, ...] = ("fp32",),  # fp32, bf16
              compile: tuple[str, ...] = ("no",),  # no, yes
              steps: int = 8,                  # steps in one timing
              repeats: int = 5,                # timings of each, in turns; the median counts
              peers: bool = False,             # time denoising-diffusion-pytorch and diffusers too
              growth: bool = False,            # vary batch, size and width one at a time, and give the exponents
              threads: int = 0,                # CPU threads; 0 as many as torch takes
              device: str | None = None,       # cuda, mps or cpu
              out: str = "runs/benchmark"):    # folder for benchmark.txt and benchmark.json
    """Time, print and write the table. Raises ValueError for a method, precision or size that cannot be."""
    torch.set_num_threads(threads or torch.get_num_threads())
    device, out = pick_device(device), Path(out)
    shared = dict(width=width, mults=mults or None, attention=attention or None)
    cases = [shared | dict(method=m, size=s, batch=b, precision=p, compile=c) for m, s, b, p, c in itertools.product(methods, size, batch, precision, compile)]
    if growth:
        base = shared | dict(method=methods[0], size=32, batch=16, width=32, precision="fp32", compile="no")
        cases = [base | {key: value} for key, values in dict(batch=(4, 8, 16, 32, 64), size=(16, 32, 64), width=(16, 32, 64, 128)).items() for value in values]
    if set(methods) - METHODS.keys() or set(precision) - {"fp32", "bf16"} or set(compile) - {"no", "yes"}:
        raise ValueError("--methods, --precision fp32 bf16 and --compile no yes take only these values")
    if peers:
        check_peers()
    timers = []
    for case in cases:
        case["checkpoint"] = plain(case)
        timers += [(case, "ours", train_py), (case, "reference", reference_step), (case, "sampling", sampling_step), (case, "network", network_call)]
        timers += [(case, "denoising-diffusion-pytorch", lucidrains), (case, "diffusers", diffusers)] * peers
    found = {}
    for k in range(repeats):
        for case, name, timer in timers:
            if (value := timer(case, steps, device)) is not None:
                found.setdefault((cases.index(case), name), []).append(value)
    rows, best = [], peak(device)
    for i, case in enumerate(cases):
        got = {name: statistics.median(found[i, name]) for j, name in found if j == i}
        flops = count_flops(case)
        row = {key: case[key] for key in ("method", "size", "batch", "width", "precision", "compile")}
        row |= dict(images_per_s=got["ours"], ratio=got["ours"] / got["reference"], spread=max(found[i, "ours"]) / min(found[i, "ours"]),
                    gflop=flops / 1e9, share_of_peak=3 * flops * got["ours"] / best, sampled_per_s=got["sampling"], sampling_overhead=got["network"] / got["sampling"] - 1,
                    memory_mb=memory(case, device))
        for peer in case.get("peers", ()):                       # images a second, ours over theirs, and arithmetic a second
            row |= {f"times_{peer}": got["ours"] / got[peer], f"arithmetic_{peer}": got["ours"] * flops / (got[peer] * case["peers"][peer][3])}
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    text = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32 peak {best / 1e9:.0f} GFLOP/s, medians of {repeats}\n"
    text += "\n".join(" | ".join(map(str, line)) for line in [list(rows[0]), *[row.values() for row in rows]]) + "\n"
    if growth:
        for key in ("batch", "size", "width"):
            group = [row for row in rows if all(row[k] == base[k] for k in ("batch", "size", "width") if k != key)]
            for what, value in (("step time", lambda r: r["batch"] / r["images_per_s"]), ("memory", lambda r: r["memory_mb"]), ("arithmetic", lambda r: r["gflop"] * r["batch"])):
                slope = np.polyfit(np.log([r[key] for r in group]), np.log([max(value(r), 1e-3) for r in group]), 1)[0]
                text += f"{what} grows as {key}^{slope:.2f}\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.txt").write_text(text)
    (out / "benchmark.json").write_text(json.dumps(rows, indent=1))
    print(text + f"wrote {out / 'benchmark.txt'} and benchmark.json")


def plain(case):
    config = {name: p.default for f in (METHODS[case["method"]], UNet, train.train) for name, (p, _) in flags_of(f).items()} | train.DEFAULTS[case["method"]]
    config |= {key: case[key] for key in ("width", "mults", "attention") if case[key] is not None} | ({"p_full": 1.0} if "p_full" in config else {})       # whole images
    if case["attention"] is None:
        config["attention"] = tuple(level for level in config["attention"] if level < len(config["mults"]))
    case["width"] = config["width"]
    return dict(method=case["method"], config=config, shape=[3, case["size"], case["size"]], classes=[])


def train_py(case, steps, device):
    """Images a second that train.py itself reports, after its first steps."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        np.save(f"{folder}/x.npy", np.random.default_rng(0).integers(0, 256, (256, 3, case["size"], case["size"]), np.uint8))
        config = case["checkpoint"]["config"]
        attention = ["--attention", *map(str, config["attention"])] if case["method"] != "pdm" or config["attention"] else []
        train.main(["--method", case["method"], "--data", f"{folder}/x.npy", "--out", f"{folder}/run", "--steps", str(2 * steps), "--every", str(steps), "--grid", "1",
                    "--batch", str(case["batch"]), "--precision", case["precision"], "--device", str(device), "--width", str(config["width"]),
                    "--mults", *map(str, config["mults"]), *attention, *["--compile"] * (case["compile"] == "yes"), *["--p_full", "1"] * ("p_full" in config)])
        return float(list(csv.DictReader(open(f"{folder}/run/log.csv")))[-1]["images_per_s"])


def reference_step(case, steps, device):
    """Images a second of the step as most would write it."""
    method = build(case["checkpoint"]).to(device)
    averaged = [w.detach().clone() for w in method.parameters()]
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-4)
    images = torch.randint(0, 256, (256, *case["checkpoint"]["shape"]), dtype=torch.uint8)
    loader = itertools.cycle(torch.utils.data.DataLoader(images, batch_size=case["batch"], shuffle=True, drop_last=True))
    for step in range(steps + 2):
        if step == 2:
            start = clock(device)
        x = next(loader).to(device).float() / 127.5 - 1
        loss = method.loss(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, w in zip(averaged, method.parameters()):
                a.mul_(0.999).add_(w, alpha=0.001)
        loss.item()
    return case["batch"] * steps / (clock(device) - start)


@torch.no_grad()
def network_call(case, steps, device):
    """Images a second of the network alone, called as the sampler calls it."""
    D, x, sigma = sampler(case, device)
    D(x, sigma)
    start = clock(device)
    for _ in range(steps):
        D(x, sigma)
    return len(x) * steps / (clock(device) - start)


@torch.no_grad()
def sampling_step(case, steps, device):
    """Images a second and step of the method's own sampler (EDM's: two evaluations a step but the last)."""
    D, x, _ = sampler(case, device)
    method, noise = D.method if hasattr(D, "method") else D, train.seeded_noise([(0, i) for i in range(len(x))])
    steps = 2 * steps if hasattr(method, "T") else steps
    next(method.sample(x, steps=steps, randn_like=noise))
    start = clock(device)
    for _ in method.sample(x, steps=steps, randn_like=noise):
        pass
    calls = steps if hasattr(method, "T") else 2 * steps - 1
    return len(x) * calls / (clock(device) - start)


def sampler(case, device):
    if "sampler" not in case:
        method = to_device(build(case["checkpoint"]), device).eval().requires_grad_(False)
        train.to_precision(method, device, case["precision"])
        case["sampler"] = denoiser(method), torch.randn(case["batch"], *case["checkpoint"]["shape"], device=device), torch.tensor(1.0).view(1, 1, 1, 1)
    return case["sampler"]


def clock(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak(device):
    """FLOP/s of a large fp32 matrix product, the best of ten."""
    a, best = torch.randn(2048, 2048, device=device), math.inf
    for _ in range(10):
        start = clock(device)
        a @ a
        best = min(best, clock(device) - start)
    return 2 * 2048 ** 3 / best


def count_flops(case):
    """Of one image's way forward; a training step takes three times as many."""
    method = build(case["checkpoint"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(method)(torch.zeros(1, *case["checkpoint"]["shape"]), 1.0)
    return counter.get_total_flops()


def memory(case, device):
    """Megabytes that one training step takes beyond weights and images, at its peak; on a CPU what its tensors kept for the backward pass weigh."""
    method, x = to_device(build(case["checkpoint"]), device), torch.zeros(case["batch"], *case["checkpoint"]["shape"], device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.loss(x).backward()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    kept, own = {}, {w.data_ptr() for w in method.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t):
        method.loss(x)
    return sum(size for pointer, size in kept.items() if pointer not in own) / 1e6


# What people use instead: their networks of about the same size, their losses, in the step above. Compared by images and by arithmetic done a second, since no two networks are alike.

def peer_step(name, case, steps, device, make):
    if "peers" not in case:
        case["peers"] = {}
    if name not in case["peers"]:
        loss, parameters, forward = make(case, device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        case["peers"][name] = loss, list(parameters), torch.optim.Adam(parameters, lr=1e-4), counter.get_total_flops()
    loss, parameters, optimizer, _ = case["peers"][name]
    x = torch.rand(case["batch"], *case["checkpoint"]["shape"], device=device) * 2 - 1
    for step in range(steps + 2):
        if step == 2:
            start = clock(device)
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        value.item()
    return case["batch"] * steps / (clock(device) - start)


def check_peers():
    if not all(importlib.util.find_spec(name) for name in ("denoising_diffusion_pytorch", "diffusers")):
        raise ValueError("--peers needs pip install denoising-diffusion-pytorch diffusers")


def lucidrains_net(config):
    from denoising_diffusion_pytorch import Unet
    return Unet(dim=config["width"], dim_mults=tuple(int(m) for m in config["mults"]))


def diffusers_net(config, size):
    from diffusers import UNet2DModel
    channels = tuple(int(config["width"] * m) for m in config["mults"])
    return UNet2DModel(sample_size=size, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=channels, down_block_types=["DownBlock2D"] * len(channels),
                       up_block_types=["UpBlock2D"] * len(channels), norm_num_groups=math.gcd(16, *channels))


def lucidrains(case, steps, device):
    def make(case, device):
        from denoising_diffusion_pytorch import GaussianDiffusion
        net = lucidrains_net(case["checkpoint"]["config"]).to(device)
        diffusion = GaussianDiffusion(net, image_size=case["size"], timesteps=1000, auto_normalize=False).to(device)
        one = torch.zeros(1, 3, case["size"], case["size"], device=device)
        return diffusion, list(net.parameters()), lambda: net(one, torch.zeros(1, device=device))
    return peer_step("denoising-diffusion-pytorch", case, steps, device, make)


def diffusers(case, steps, device):
    def make(case, device):
        from diffusers import DDPMScheduler
        net = diffusers_net(case["checkpoint"]["config"], case["size"]).to(device)
        scheduler = DDPMScheduler(num_train_timesteps=1000)

        def loss(x):
            eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
            return torch.nn.functional.mse_loss(net(scheduler.add_noise(x, eps, t), t).sample, eps)
        one = torch.zeros(1, 3, case["size"], case["size"], device=device)
        return loss, list(net.parameters()), lambda: net(one, 1)
    return peer_step("diffusers", case, steps, device, make)


main = script(benchmark, __doc__)

if __name__ == "__main__":
    command(main)
