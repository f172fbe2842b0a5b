"""PDM's point: under noise the best prediction is a blur.

    python experiments/blur.py runs/pdm

Writes a picture of three rows at eight noise levels: a held-out image with noise, the optimal
prediction (the mean of the training images given x_t), and the network's prediction. Any
checkpoint will do.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edm import denoiser
from experiments.common import check_counts
from pdm import posterior_mean
from plumbing import checkpoint, drawing, images
from plumbing.datasets import hold_out, load_like
from plumbing.device import seeded_noise
from plumbing.flags import run, script

LEVELS = [0.1 * 400 ** (k / 7) for k in range(8)]  # sigma, 0.1 to 40


def blur(
    path,
    *,
    image: int = 0,  # which of the held-out images
    limit: int = 20000,  # training images in the optimal prediction
    seed: int = 0,  # seed of the noise, the same at every level
    out: str = "blur.png",  # the picture
):
    """Draw the three rows and print how far apart the two predictions are."""
    check_counts(1, limit=limit)
    drawing.check_range("seed", seed, 0, 2**63)
    drawing.make_folder(Path(out).parent)
    method, saved = checkpoint.load(path)
    x, labels = load_like(saved, saved["config"]["data"])
    (known, _), (held_out, _) = hold_out(x, labels, saved["config"]["overfit"])
    drawing.check_range("image", image, 0, len(held_out) - 1)
    known = images.to_float(known[:limit])
    x_0 = images.to_float(held_out[image : image + 1])
    eps = seeded_noise([(seed, 0)])(x_0)

    D = denoiser(method)
    device = next(method.parameters()).device
    columns = []
    for level in LEVELS:
        sigma = float(D.round_sigma(level))
        noisy = x_0 + sigma * eps
        alpha_bar = 1 / (1 + sigma**2)
        optimal = posterior_mean(alpha_bar**0.5 * noisy, alpha_bar, known)
        with torch.no_grad():
            network = D(noisy.to(device), sigma).float().cpu()
        columns.append(torch.cat([noisy / (1 + sigma), optimal, network]))  # (3, C, H, W)
        print(f"sigma {sigma:7.3f}: {compared(optimal, network, x_0)}")
    rows = torch.stack(columns, dim=1)                                  # (3, 8, C, H, W)
    images.save_grid(rows.flatten(0, 1), out, columns=len(LEVELS))
    print(f"wrote {out}: {len(known):,} images in the optimal prediction")


def compared(optimal, network, x_0):
    """How sharp both predictions are, and how far from the image, in words."""
    sharp = f"optimal {step(optimal):.3f}, network {step(network):.3f}"
    far = f"optimal {rmse(optimal, x_0):.3f}, network {rmse(network, x_0):.3f}"
    return f"mean step between neighbouring pixels: {sharp}; RMSE from the image: {far}"


def step(x):
    return (x[..., 1:] - x[..., :-1]).abs().mean().item()


def rmse(x, x_0):
    return (x - x_0).square().mean().sqrt().item()


main = script(blur, __doc__)

if __name__ == "__main__":
    run(main)
