"""Measure a trained model:  python evaluate.py runs/pdm --error

    --nll       bits/dim of held-out images by the variational bound, its terms, rate and
                distortion: of methods that have a bound
    --error     error of the predicted image against the noise level, beside that of a model
                which has learned the training images by heart
    --frechet   Frechet distance between samples and data on the features of --features FILE,
                precision and recall
    --nearest   the training images closest to the samples: are they copies?

Its flags are the keyword arguments of `evaluate` below and of the sampler, as in sample.py.
Guidance is off (1) unless asked for. report.json keeps the results of each step of the run.
"""
import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

from plumbing import flags  # before torch: Ctrl-C while that loads ends without a traceback

# isort: split
import torch
from tqdm import tqdm

from edm import denoiser
from pdm import posterior_mean
from plumbing import checkpoint, drawing, images
from plumbing.checkpoint import written_whole
from plumbing.datasets import evenly, hold_out, load_like
from plumbing.device import join, rank, seeded_noise
from plumbing.drawing import check_range, in_batches
from plumbing.flags import UserError
from plumbing.frechet import Features, frechet_distance, moments, precision_and_recall
from sample import chain, draw, parse

NEIGHBOURS = 3  # of precision and recall,
MOST_COMPARED = 10_000  # which are of so many images at most: their cost is that squared
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


class Data(NamedTuple):
    """Images (N, C, H, W), uint8 or latents, labels (N,) or None, and what they are."""

    x: torch.Tensor
    y: torch.Tensor | None
    source: str  # what --data takes
    words: str


def evaluate(
    path,
    options,
    saved=None,
    *,
    nll: bool = False,  # bits/dim of held-out images; --steps shortens the chain
    error: bool = False,  # error by noise level; what is measured if nothing is named
    frechet: bool = False,  # Frechet distance of n samples from the data, precision, recall
    nearest: bool = False,  # training images closest to the samples
    features: str | None = None,  # TorchScript file: uint8 (B, C, H, W) -> (B, D); it is code
    sampler: Literal["own", "heun", "euler", "churn"] = "own",  # the method's, or one of EDM's
    n: int = 128,  # images to measure or to draw; held-out ones are at most 128
    data: str | None = None,  # other images to measure than those held out from the run's data
    guidance: float | None = None,  # weight of guidance in drawing; default 1, which is none
    seed: int = 0,  # seed of all noise
    batch: int = 64,  # images at a time; halved by itself where a GPU's memory is short
    raw: bool = False,  # use the weights as trained, not their average
    out: str | None = None,  # folder for report.json and the tables; default <run>/evaluation
    device: str | None = None,  # cuda, mps or cpu; default the first that is there
):
    """Measure what is asked for, print it, write it to out/report.json and return it.

    saved: the checkpoint, where it has been read. Raises UserError for what cannot be, before
    any work.
    """
    error = error or not (nll or frechet or nearest)
    check_range("n", n, 2 if frechet else 1, 10**6)
    check_range("batch", batch, 1, 10**6)
    check_range("seed", seed, 0, 2**63)
    method, saved = checkpoint.load(path, ema=not raw, device=device, saved=saved)
    where = next(method.parameters()).device
    out = Path(out) if out is not None else drawing.run_folder(path) / "evaluation"
    earlier = read_report(out / "report.json", saved)
    run = chain(method, sampler, options, saved["shape"])
    labels = drawing.choose_labels(n, (), saved["classes"])
    w = drawing.choose_guidance(method, 1.0 if guidance is None else guidance, labels)
    network = network_of(features, frechet, saved, where)
    trained_on, held_out = data_of(saved, data, n, error or frechet or nearest)
    steps = options.get("steps") if sampler == "own" else None
    if nll:
        check_bound(method, saved, held_out, steps)
    drawing.make_folder(out)

    results = dict(checkpoint=str(path), method=saved["method"], step=saved["step"])
    results |= dict(weights="raw" if raw else "averaged", trained_on=saved["config"]["data"])
    print("{checkpoint}: {method}, {step:,} steps, {weights} weights".format(**results))
    if nll:
        results["nll"] = measure_nll(method, held_out, steps, batch, seed, out)
    if error:
        results["error"] = measure_error(method, trained_on, held_out, batch, seed, out)
    if frechet or nearest:
        with drawing.counted(method, n) as cost, drawing.guided(method, w):
            keys = [(seed, i) for i in range(n)]
            samples = draw(run, saved["shape"], keys, batch, labels, where)
        print(f"samples: {cost}{drawing.guidance_note(labels, w)}")
        drawn = dict(sampler=sampler, options=options, guidance=w) | asdict(cost)
    if frechet:
        results["frechet"] = measure_frechet(network, samples, trained_on, batch) | drawn
    if nearest:
        results["nearest"] = measure_nearest(samples, trained_on, held_out, out) | drawn
    report = write_report(out / "report.json", earlier, results)
    print(f"wrote {out}/report.json")
    return report


# What is measured on

def data_of(saved, data, n, needs_trained):
    """Data trained on (None where it is not needed), and up to n images that were held out.

    data: other images than those held out, or None.
    """
    source = saved["config"]["data"]
    trained_on = None
    if needs_trained or data is None:
        x, y = load_like(saved, source)
        train, held_out = hold_out(x, y, saved["config"]["overfit"])
        trained_on = Data(*train, source, f"images of {source}")
        total = len(x[: saved["config"]["overfit"] or None])
        words = f"held-out images of {source}"
        if len(trained_on.x) == total:
            words = f"images of {source} (none was held out)"
    if data is not None:
        held_out = load_like(saved, data)
        words = f"images of {data}"
    x, y = held_out
    some = evenly(n, len(x))
    y = None if y is None else y[some]
    return trained_on, Data(x[some], y, data or source, words)


def check_bound(method, saved, held_out, steps):
    """UserError where the bits of these images cannot be counted."""
    if not hasattr(method, "bits_per_dim"):
        methods = checkpoint.METHODS.items()
        able = [name for name, cls in methods if hasattr(cls, "bits_per_dim")]
        name = saved["method"]
        raise UserError(f"--nll belongs to {', '.join(able)}: {name} has no variational bound")
    if held_out.x.is_floating_point():
        raise UserError(f"--nll counts the bits of 8-bit images; {held_out.words} are floats")
    if len(method.kept_steps(steps)) < 2:
        raise UserError("--nll needs a chain of 2 steps or more")


# Likelihood

def measure_nll(method, held_out, steps, batch, seed, out):
    """The bound on the bits/dim of images: a dict; its terms go to out/terms.csv."""
    with drawing.counted(method, len(held_out.x)) as cost:
        result, terms = likelihood(method, held_out.x, held_out.y, steps, batch, seed)
    write_table(out / "terms.csv", terms)
    error = math.nan if result["standard_error"] is None else result["standard_error"]
    parts = "L_T {prior:.5f}, L_1 and up {rate:.3f}, L_0 {decoder:.3f}".format(**result)
    bits = result["bits_per_dim"]
    print(f"NLL at most {bits:.3f} +- {error:.3f} bits/dim in {result['steps']} steps: {parts}")
    early = result["first_percent"]
    print(f"of it {early:.3f} ({early / bits:.0%}) from the first 1% of the steps")
    print("reverse steps done, rate (bits/dim), distortion (RMSE, 0 to 255):")
    for k in range(1, 11):
        done = max(1, round(len(terms) * k / 10))
        row = terms[-done]
        print(f"{done:7d} {row['rate']:9.5f} {row['distortion']:8.3f}")
    print(f"{held_out.words}: {cost}")
    return result | asdict(cost)


def likelihood(method, x, y, steps, batch, seed):
    """The bound on 8-bit images x (n, C, H, W): a dict, and a row a kept t, t = 1 first.

    A row's rate is what has been received once x_t is known, its distortion the RMSE of x_0_hat
    (0 to 255) there; DDPM Algorithm 4.
    """
    kept = method.kept_steps(steps)
    device = next(method.parameters()).device

    def part(indices):
        noise = seeded_noise([(seed, i) for i in indices])
        labels = None if y is None else y[indices].to(device)
        x_0 = images.to_float(x[indices]).to(device)
        bound = method.bits_per_dim(x_0, labels, steps=steps, randn_like=noise, progress=ticks)
        scalars = torch.stack([bound["total"], bound["prior"]], dim=1)  # (B, 2)
        return torch.cat([scalars, bound["terms"], bound["mse"]], dim=1).cpu().double()

    def ticks(loop):
        for step in loop:
            yield step
            bar.update()

    with tqdm(unit=" steps", desc="bits/dim", disable=rank() > 0) as bar:
        bounds = in_batches(part, len(x), batch)  # (n, 2 + 2 steps)
    total = bounds[:, 0]
    prior = bounds[:, 1].mean()
    terms, mse = bounds[:, 2:].mean(0).chunk(2)  # (steps,)
    rate = prior + terms.sum() - terms.cumsum(0)
    distortion = 127.5 * mse.sqrt()
    columns = zip(kept, terms.tolist(), rate.tolist(), distortion.tolist())
    rows = [dict(t=t, bits_per_dim=b, rate=r, distortion=d) for t, b, r, d in columns]
    result = dict(
        bits_per_dim=total.mean().item(),
        standard_error=(total.std() / len(x) ** 0.5).item() if len(x) > 1 else None,
        prior=prior.item(),
        rate=rate[0].item(),
        decoder=terms[0].item(),
        distortion=distortion[0].item(),
        first_percent=sum(row["bits_per_dim"] for row in rows if row["t"] <= method.T / 100),
        steps=len(kept),
    )
    return result, rows


# Error against noise level

def measure_error(method, trained_on, held_out, batch, seed, out):
    """The errors at each level, in a dict and in out/error.csv."""
    device = next(method.parameters()).device
    shown = len(held_out.x) + min(len(held_out.x), len(trained_on.x))
    with drawing.counted(method, shown) as cost:
        rows = errors(denoiser(method), trained_on, held_out, batch, seed, device)
    write_table(out / "error.csv", rows)
    print(f"{held_out.words}, and as many trained on: {cost}")
    return dict(levels=rows) | asdict(cost)


def errors(D, trained_on, held_out, batch, seed, device):
    """RMSE of D(x; sigma) at each noise level, a dict a level; trained_on, held_out: Data.

    Of held-out images, of as many images trained on, and by_heart: of those, by a model that
    has learned the training images by heart, which is their posterior mean (of the image's own
    class, where there are classes). No denoiser does better there; on held-out images many do.
    Of large sets 50,000 images, or 2 GB, evenly spaced, stand for all.
    """
    most = min(50_000, int(5e8) // trained_on.x[0].numel())
    few = evenly(most, len(trained_on.x))
    known = images.to_float(trained_on.x[few])
    classes = None if trained_on.y is None else trained_on.y[few]
    some = evenly(len(held_out.x), len(known))
    learned = known[some]
    learned_classes = None if classes is None else classes[some]
    new = images.to_float(held_out.x)

    def at(sigma, x, y, denoise):
        """RMSE of denoise(noisy images, labels) on images x."""

        def part(indices):
            x_0 = x[indices]
            noisy = x_0 + sigma * seeded_noise([(seed, i) for i in indices])(x_0)
            x_0_hat = denoise(noisy, None if y is None else y[indices])
            return (x_0_hat - x_0).double().square().flatten(1).mean(1)

        return in_batches(part, len(x), batch).mean().sqrt().item()

    def network(noisy, y):
        y = None if y is None else y.to(device)
        return D(noisy.to(device), sigma, y).float().cpu()

    def by_heart(noisy, y):
        return optimal(noisy, y, sigma, known, classes)

    rows = []
    print("sigma  held-out  trained on  by heart  (RMSE in [-1, 1])")
    for level in LEVELS:
        if not D.sigma_min <= level <= D.sigma_max:
            continue
        sigma = float(D.round_sigma(level))
        row = dict(sigma=level, level_used=sigma)
        row["held_out"] = at(sigma, new, held_out.y, network)
        row["trained_on"] = at(sigma, learned, learned_classes, network)
        row["by_heart"] = at(sigma, learned, learned_classes, by_heart)
        rows.append(row)
        errors_of = "{held_out:8.4f}  {trained_on:10.4f}  {by_heart:8.4f}".format(**row)
        print(f"{level:<6g} {errors_of}", flush=True)
    return rows


def optimal(noisy, y, sigma, known, classes):
    """E[x_0 | noisy = x_0 + sigma n] (B, C, H, W), if x_0 is one of `known`, of its class y."""
    alpha_bar = 1 / (1 + sigma**2)
    x_t = alpha_bar**0.5 * noisy
    if y is None:
        return posterior_mean(x_t, alpha_bar, known)
    best = torch.empty_like(noisy)
    for label in y.unique():
        best[y == label] = posterior_mean(x_t[y == label], alpha_bar, known[classes == label])
    return best


# Frechet distance

def network_of(features, frechet, saved, device):
    """The Features that --frechet asks for, or None."""
    if frechet != (features is not None):
        trains = "experiments/tools/features.py trains such a file"
        raise UserError(f"--frechet and --features FILE go together; {trains}")
    if not frechet:
        return None
    if saved["latents"]:
        raise UserError("--frechet needs a model of 8-bit images, not of latents")
    return Features(features, saved["shape"], device)


def measure_frechet(network, samples, trained_on, batch):
    """The distance of samples (n, C, H, W) in [-1, 1] from the training images, in a dict."""
    fewest = min(len(samples), len(trained_on.x))
    if fewest <= network.dimensions:
        few = f"{fewest} images for {network.dimensions} features"
        print(f"warning: {few}: the distance comes out too high; give more of them")
    vectors = network(images.to_uint8(samples), batch)
    known = network.statistics(trained_on.x, trained_on.source, batch)
    value = frechet_distance(*moments(vectors), *known)
    sizes = dict(samples=len(samples), images=len(trained_on.x), dimensions=network.dimensions)
    notes = "".join(f", {key} {text}" for key, text in (sizes | network.about).items())
    print(f"{network.name}: {value:.3f} from {trained_on.words}{notes}")
    shares = measure_shares(network, vectors, trained_on, batch)
    about = dict(name=network.name, value=value, features=network.path)
    return network.about | sizes | about | shares


def measure_shares(network, vectors, trained_on, batch):
    """Precision and recall of samples with features (n, D), and of as many training images."""
    count = min(len(vectors), len(trained_on.x), MOST_COMPARED)
    known = network(trained_on.x[evenly(count, len(trained_on.x))], batch)
    k = min(NEIGHBOURS, count - 1)
    precision, recall = precision_and_recall(vectors[:count], known, k)
    of_each = f"of {count:,} samples and as many images, k = {k}"
    print(f"precision {precision:.3f}, recall {recall:.3f}: {of_each}")
    return dict(precision=precision, recall=recall, of_each=count, k=k)


# Nearest training images

def measure_nearest(samples, trained_on, held_out, out):
    """How near samples lie to the training images, against how near held-out images do: a dict.

    A copy is a sample whose nearest training image is three times as near as its 50 nearest are
    on average. The grid out/nearest.png shows samples, each with its three closest images.
    """
    distance, index = closest(samples, trained_on.x)
    usual, _ = closest(images.to_float(held_out.x), trained_on.x)
    if rank() == 0:
        neighbours = images.to_float(trained_on.x[index[:16, :3].flatten()])
        neighbours = neighbours.unflatten(0, (-1, min(3, len(trained_on.x))))
        rows = torch.cat([samples[:16, None], neighbours], dim=1)  # (16, 4, C, H, W)
        columns = 2 * rows.shape[1]
        images.save_grid(rows.flatten(0, 1), out / "nearest.png", columns=columns)
    is_copy = distance[:, 0] < distance.mean(1) / 3
    result = dict(
        samples=distance[:, 0].median().item(),
        held_out=usual[:, 0].median().item(),
        copies=is_copy.double().mean().item(),
    )
    numbers = f"samples {result['samples']:.1f}, {held_out.words} {result['held_out']:.1f}"
    print(f"median distance to the nearest training image (RMSE, 0 to 255): {numbers}")
    three_times = "three times as near to one as to its 50 nearest on average"
    print(f"{result['copies']:.0%} of the samples are copies, {three_times}")
    return result


def closest(x, data, k=50):
    """RMSE (0 to 255) and index, (N, k) each, of the k images of data nearest to each of x.

    x (N, C, H, W) in [-1, 1]; data (M, C, H, W), uint8 or in [-1, 1].
    """
    flat = x.flatten(1).double()
    distances = []
    for part in data.split(max(1, int(2e7) // data[0].numel())):
        distances.append(torch.cdist(flat, images.to_float(part).flatten(1).double()))
    distance, index = torch.cat(distances, dim=1).topk(min(k, len(data)), largest=False)
    return 127.5 * distance / flat.shape[1] ** 0.5, index


# What is written

def write_table(path, rows):
    """Write a list of dicts as a .csv; of several processes only the first does."""
    if rank() == 0:
        with written_whole(path, "w") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_report(path, saved):
    """{"step 3000": results, ...} of a report that is there; {} without one.

    UserError for a file that is none, or of another run.
    """
    if not path.exists():
        return {}
    elsewhere = "move it away, or name another folder with --out"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        facts = {(results["method"], results["trained_on"]) for results in report.values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is no report of this command: {elsewhere}") from None
    if facts - {(saved["method"], saved["config"]["data"])}:
        raise UserError(f"{path} is the report of another run: {elsewhere}")
    return report


def write_report(path, earlier, results):
    """Add results to those that are there of the same step and weights, and return these."""
    raw = " raw" if results["weights"] == "raw" else ""
    step = f"step {results['step']}{raw}"
    report = earlier.get(step, {}) | results
    if rank() == 0:
        with written_whole(path, "w") as file:
            json.dump(earlier | {step: report}, file, indent=1)
    return report


def main(argv):
    join()
    path, saved, options, given = parse(argv, evaluate, __doc__, "evaluate.py")
    evaluate(path, options, saved, **given)


if __name__ == "__main__":
    flags.run(main)
