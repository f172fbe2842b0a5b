"""Measure a trained model:  python evaluate.py runs/pdm/ckpt.pt --error

    --nll       bits/dim of held-out images by the variational bound, its terms by t, rate and distortion   (ddpm, iddpm, pdm)
    --error     error of the predicted image against the noise level, beside the least possible one         (every method)
    --frechet   Frechet distance between samples and data on the features of --features FILE                (every method)
    --nearest   the training images closest to the samples: are they copies?                                (every method)

Its flags are the keyword arguments of `evaluate` below and of the sampler, as in sample.py.
"""
import csv
import hashlib
import json
import math
import os
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as pixels
from edm import denoiser
from pdm import posterior_mean
from sample import Cost, chain, draw, guide, in_batches, parse
from train import command, evenly, hold_out, load, ranks, seeded_noise

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def evaluate(path, options, *,
             nll: bool = False,          # bits/dim of held-out images; --steps shortens the chain
             error: bool = False,        # error of the predicted image by noise level; what is measured if nothing is named
             frechet: bool = False,      # Frechet distance between n samples and the data
             nearest: bool = False,      # training images closest to the samples
             features: str | None = None,  # TorchScript file for --frechet: uint8 images (B, C, H, W) -> (B, D); it is code, and runs
             sampler: typing.Literal["own", "heun", "euler", "churn"] = "own",  # how samples are drawn: the method's own way, or EDM's
             n: int = 128,               # images to measure or to draw; held-out ones are at most 128
             data: str | None = None,    # other images to measure than those held out from the run's data
             guidance: float | None = None,  # weight of classifier-free guidance in drawing
             seed: int = 0,              # seed of all noise
             batch: int = 64,            # images at a time; halved by itself where a GPU's memory is short
             raw: bool = False,          # use the weights as trained, not their average
             out: str | None = None,     # folder for report.json and the tables; default <run>/evaluation
             device: str | None = None): # cuda, mps or cpu; default the first of them that is there
    """Measure what is asked for, print it, write it to out/report.json and return that dict. Raises ValueError before any work."""
    if min(n, batch) < 1:
        raise ValueError(f"--n and --batch must be 1 or more, got {n} and {batch}")
    if frechet != (features is not None):
        raise ValueError("--frechet and --features FILE go together; experiments/features.py trains such a file")
    method, checkpoint = load(path, ema=not raw, device=device)
    device, shape, classes, source = next(method.parameters()).device, checkpoint["shape"], checkpoint["classes"], checkpoint["config"]["data"]
    if nll and not hasattr(method, "bits_per_dim"):
        raise ValueError(f"--nll belongs to ddpm, iddpm and pdm: {checkpoint['method']} has no variational bound")
    if frechet and (checkpoint.get("latents") or n < 2):
        raise ValueError("--frechet needs --n 2 or more, and a model of 8-bit images, not of latents")
    out, error = Path(out or Path(path).parent / "evaluation"), error or not (nll or frechet or nearest)
    if out.is_file():
        raise ValueError(f"--out {out} is a file; it names a folder")
    network = Features(features, shape, device) if frechet else None
    kind = f"images of {data}" if data else f"held-out images of {source}"
    if error or frechet or nearest or data is None:
        images, labels = load_like(checkpoint, source)
        (x, y), (held, held_y) = hold_out(images, labels, checkpoint["config"]["overfit"])
        if data is None and len(x) == len(images[:checkpoint["config"]["overfit"] or None]):
            kind = f"images of {source} (none was held out)"
    if data is not None:
        held, held_y = load_like(checkpoint, data)
    some = evenly(n, len(held))
    held, held_y = held[some], None if held_y is None else held_y[some]
    if nll and held.is_floating_point():
        raise ValueError(f"--nll counts the bits of 8-bit images; {data or source} holds floats")
    held = pixels.to_float(held)
    steps = options.get("steps") if sampler == "own" else None
    if nll and len(method.kept_steps(steps)) < 2:
        raise ValueError("--nll needs a chain of 2 steps or more")
    labels = torch.arange(n) % len(classes) if classes else None
    if guidance is not None and not classes:
        raise ValueError("--guidance needs a model trained with --conditional")
    chain(method, sampler, options, shape)
    out.mkdir(parents=True, exist_ok=True)

    report = dict(checkpoint=str(path), method=checkpoint["method"], step=checkpoint["step"], weights="raw" if raw else "averaged", trained_on=source)
    print(f"{path}: {checkpoint['method']}, {checkpoint['step']:,} steps, {report['weights']} weights")
    if nll:
        with Cost(method, len(held)) as cost:
            report["nll"] = likelihood(method, held, held_y, steps, batch, seed, device, out / "terms.csv")
        report["nll"] |= cost.says(kind)
    if error:
        with Cost(method, len(held) + min(len(held), len(x))) as cost:
            report["error"] = dict(levels=errors(denoiser(method), (x, y), (held, held_y), batch, seed, device, out / "error.csv"))
        report["error"] |= cost.says(f"{kind} and images trained on, optimal prediction included")
    if frechet or nearest:
        weight = guide(method, guidance, labels)
        run = chain(method, sampler, options, shape)
        with Cost(method, n) as cost:
            samples = draw(run, shape, [(seed, i) for i in range(n)], batch, labels, device)
        report["samples"] = dict(sampler=sampler, options=options) | ({} if weight is None else dict(guidance=weight)) | cost.says("samples")
    if frechet:
        report["frechet"] = frechet_report(network, samples, x, source, batch)
    if nearest:
        report["nearest"] = nearest_report(samples, x, held, kind, out / "nearest.png")
    before = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}
    if all(before.get(key) == report[key] for key in ("checkpoint", "method", "step", "weights")):
        report = before | report
    if ranks()[0] == 0:
        (out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"wrote {out / 'report.json'}" + " and terms.csv" * nll + " and error.csv" * error + " and nearest.png" * nearest)
    return report


def load_like(checkpoint, source):
    """Images of the checkpoint's shape, and labels (None for an unconditional model); ValueError where they do not fit it."""
    C, *size = checkpoint["shape"]
    try:
        images, labels, names = pixels.load(source, *(None, None) if checkpoint.get("latents") else (size, C))
    except ValueError as error:
        raise ValueError(f"{error} (the images of this run; --data names others for --nll)" if source == checkpoint["config"]["data"] else error)
    if list(images.shape[1:]) != checkpoint["shape"]:
        raise ValueError(f"{source} holds {'x'.join(map(str, images.shape[1:]))}, the model was trained on {'x'.join(map(str, checkpoint['shape']))}")
    classes = checkpoint["classes"]
    if classes and names != classes:
        raise ValueError(f"the model knows the classes {', '.join(classes[:10])}; {source} has {', '.join(names[:10]) or 'none'}")
    return images, labels if classes else None


def table(path, rows):
    """Write a list of dicts as a .csv; of several processes only the first does."""
    with open(path if ranks()[0] == 0 else os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# Likelihood

def likelihood(method, x, y, steps, batch, seed, device, path):
    """The bound on images x (n, C, H, W): a dict of bits/dim; its terms go to a table at `path`, t = 1 first."""
    tau, bar = method.kept_steps(steps), tqdm(unit=" steps", desc="bits/dim")

    def ticking(loop):
        for step in loop:
            yield step
            bar.update()

    def some(which):
        found = method.bits_per_dim(x[which].to(device), None if y is None else y[which].to(device), steps=steps,
                                    randn_like=seeded_noise([(seed, i) for i in which]), progress=ticking)
        return torch.cat([found["total"][:, None], found["prior"][:, None], found["terms"], found["mse"]], dim=1).cpu().double()
    found = in_batches(some, len(x), batch, bar)                                          # (n, 2 + 2 steps)
    bar.close()
    total, prior, (terms, mse) = found[:, 0], found[:, 1].mean(), found[:, 2:].chunk(2, dim=1)
    terms = terms.mean(0)                                                                 # (steps,)
    rate = prior + terms.sum() - terms.cumsum(0)                                          # DDPM Algorithm 4: bits received when x_t is known
    distortion = 127.5 * mse.mean(0).sqrt()
    table(path, [dict(t=t, bits_per_dim=f"{a:.6g}", rate=f"{b:.6g}", distortion=f"{c:.6g}") for t, a, b, c in zip(tau, terms, rate, distortion)])
    early = sum(t <= method.T / 100 for t in tau)
    result = dict(bits_per_dim=total.mean().item(), standard_error=(total.std() / len(total) ** 0.5).item() if len(total) > 1 else None, prior=prior.item(), rate=rate[0].item(),
                  decoder=terms[0].item(), distortion=distortion[0].item(), first_percent=terms[:early].sum().item(), steps=len(tau))
    print("NLL at most {bits_per_dim:.3f} +- {error:.3f} bits/dim in {steps} steps: L_T {prior:.5f}, L_1 and up {rate:.3f}, L_0 {decoder:.3f}".format(
        error=result["standard_error"] or math.nan, **result))
    print(f"of it {result['first_percent']:.3f} ({100 * result['first_percent'] / result['bits_per_dim']:.0f}%) from the first 1% of the steps, "
          f"t = 1 to {tau[early - 1]}" if early else "no step was kept of the first 1%")
    print("reverse steps done, rate (bits/dim), distortion (RMSE, 0 to 255):")
    for k in range(1, 11):
        i = len(tau) - max(1, round(len(tau) * k / 10))
        print(f"{len(tau) - i:7d} {rate[i]:9.5f} {distortion[i]:8.3f}")
    return result


# Error against noise level

def errors(D, trained, held, batch, seed, device, path):
    """RMSE of D(x; sigma) by noise level, on held-out images and on as many of the images trained on, and for those the least
    that any denoiser can reach, which is the posterior mean over all of them (of the same class, where there are classes).

    Of large sets the first 50,000 images, or 2 GB, stand for all.
    """
    data = pixels.to_float(trained[0][:min(50_000, int(5e8) // trained[0][0].numel())])
    some = evenly(len(held[0]), len(data))
    sets = dict(held_out=held, trained_on=(data[some], None if trained[1] is None else trained[1][some]))
    rows = []
    bar = tqdm(disable=True)
    print("sigma  held-out  trained on  floor (RMSE in [-1, 1])")
    for level in LEVELS:
        if not D.sigma_min <= level <= D.sigma_max:
            continue
        sigma, row = float(D.round_sigma(level)), dict(sigma=level, level_used=float(D.round_sigma(level)))
        alpha_bar = 1 / (1 + sigma ** 2)
        for name, (x, y) in sets.items():
            def some(i):
                noisy = x[i] + sigma * seeded_noise([(seed, k) for k in i])(x[i])
                found = [D(noisy.to(device), sigma, None if y is None else y[i].to(device)).float().cpu()]
                if name == "trained_on":
                    optimal = torch.empty_like(noisy)
                    for k in range(1) if y is None else y[i].unique():
                        mine, same = (slice(None), slice(None)) if y is None else (y[i] == k, trained[1][:len(data)] == k)
                        optimal[mine] = posterior_mean(alpha_bar ** 0.5 * noisy[mine], alpha_bar, data[same])
                    found.append(optimal)
                return torch.stack([(a - x[i]).double().square().flatten(1).mean(1) for a in found], dim=1)   # (len(i), 1 or 2)
            squares = in_batches(some, len(x), batch, bar)
            row |= dict(zip((name, "floor"), squares.mean(0).sqrt().tolist()))
        rows.append(row)
        print("{sigma:<6g} {held_out:8.4f}  {trained_on:10.4f}  {floor:5.4f}".format(**row), flush=True)
    table(path, rows)
    return rows


# Frechet distance

class Features:
    """A TorchScript network that maps uint8 images (B, C, H, W), 0 to 255, to vectors (B, D); ValueError for a file that is none."""

    def __init__(self, path, shape, device):
        about = {"about.json": ""}
        try:
            self.net = torch.jit.load(path, map_location=device, _extra_files=about).eval()
            arguments = [a.name for a in self.net.forward.schema.arguments]
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise ValueError(f"{path} is not a TorchScript network: {(str(error).strip() or 'unreadable').splitlines()[0]}")
        self.path, self.device, self.about = path, device, json.loads(about["about.json"] or "{}")
        self.options = dict(return_features=True) if "return_features" in arguments else {}   # as a published Inception port has it
        try:
            blank, self.colour = torch.zeros(2, *shape, dtype=torch.uint8), shape[0]
            try:
                vector = self(blank, 2)
            except Exception:                                          # gray images for a network of three channels
                self.colour = 3
                vector = self(blank, 2)
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{path} cannot take images of {'x'.join(map(str, shape))}: {str(error).strip().splitlines()[-1]}")
        if vector.ndim != 2:
            raise ValueError(f"{path} must give one vector an image, (B, D); it gives {tuple(vector.shape)}")
        self.dimensions = vector.shape[1]
        self.is_inception = "inception" in Path(path).name.lower() and self.dimensions == 2048
        self.name = "FID" if self.is_inception else f"Frechet distance on {Path(path).name}"

    @torch.no_grad()
    def __call__(self, images, batch):
        """(N, D) float64, on the CPU, of uint8 images (N, C, H, W)."""
        def some(which):
            vectors = self.net(images[which].to(self.device).expand(-1, self.colour, -1, -1), **self.options)
            bar.update()
            if not torch.is_tensor(vectors):
                raise ValueError("it gives no tensor")
            return vectors.cpu().double()
        with tqdm(desc="features", leave=False, disable=len(images) <= batch) as bar:
            return in_batches(some, len(images), batch, bar)

    def warn_of_few(self, images):
        if images <= self.dimensions:
            print(f"warning: {images} images for {self.dimensions} features: the distance comes out too high; give more of them")

    def statistics(self, images, source, batch):
        """Mean (D,) and covariance (D, D) of the data's features, kept in a file beside the data."""
        path, key = Path(source).resolve(), hashlib.sha256(Path(self.path).read_bytes() + str(images.shape).encode())
        key.update(images.contiguous().numpy())
        kept = path.with_name(f"{path.name}.{key.hexdigest()[:12]}.stats.npz")
        try:
            with np.load(kept, allow_pickle=False) as file:
                return torch.from_numpy(file["mean"]), torch.from_numpy(file["covariance"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            mean, covariance = moments(self(images, batch))
        if path.exists() and ranks()[0] == 0:
            try:
                np.savez(kept.with_suffix(".tmp.npz"), mean=mean.numpy(), covariance=covariance.numpy())
                os.replace(kept.with_suffix(".tmp.npz"), kept)
            except OSError as error:
                print(f"note: the data's statistics could not be kept: {error}")
        return mean, covariance


def moments(features):
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians, float64; the root through symmetric eigenvalues."""
    root = square_root(covariance_1)
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()    # similar to S_1 S_2, and symmetric
    return ((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross).item()


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_report(network, samples, data, source, batch):
    network.warn_of_few(min(len(samples), len(data)))
    value = frechet_distance(*moments(network(pixels.to_uint8(samples), batch)), *network.statistics(data, source, batch))
    about = "".join(f", {key} {text}" for key, text in network.about.items())
    print(f"{network.name}: {value:.3f}  ({len(samples):,} samples, {len(data):,} images of {source}, {network.dimensions} features{about})")
    return dict(name=network.name, value=value, samples=len(samples), images=len(data), dimensions=network.dimensions, features=str(network.path), **network.about)


# Nearest training images

def nearest_report(samples, data, held, kind, path):
    """Grid of samples, each with its three closest training images; how far those are, against the same for held-out images.

    A copy is a sample whose nearest training image is three times as near as its 50 nearest are on average.
    """
    (distance, index), (usual, _) = closest(samples, data), closest(held, data)
    rows = torch.cat([samples[:16, None], pixels.to_float(data[index[:16, :3]].flatten(0, 1)).unflatten(0, (-1, min(3, len(data))))], dim=1)
    if ranks()[0] == 0:
        pixels.save_grid(rows.flatten(0, 1), path, columns=2 * rows.shape[1])              # (16, 4, C, H, W)
    result = dict(samples=distance[:, 0].median().item(), held_out=usual[:, 0].median().item(),
                  copies=(distance[:, 0] < distance.mean(1) / 3).double().mean().item())
    print("median distance to the nearest training image (RMSE, 0 to 255): samples {samples:.1f}, {kind} {held_out:.1f}; "
          "{copies:.0%} of the samples are copies, three times as near to one as to its 50 nearest on average".format(kind=kind, **result))
    return result


def closest(x, data, k=50):
    """RMSE on the 0 to 255 scale (N, k), and index (N, k), of the k images of data (uint8 or in [-1, 1]) nearest to each of x (N, C, H, W)."""
    parts = data.split(max(1, int(2e7) // data[0].numel()))
    distance = torch.cat([torch.cdist(x.flatten(1).double(), pixels.to_float(part).flatten(1).double()) for part in parts], dim=1)
    distance, index = distance.topk(min(k, len(data)), largest=False)
    return 127.5 * distance / x[0].numel() ** 0.5, index


def main(argv):
    path, options, given = parse(argv, evaluate, __doc__, "evaluate.py")
    evaluate(path, options, **given)


if __name__ == "__main__":
    command(main)
