"""PDM's point: under noise the best prediction is a blur.   python experiments/blur.py runs/pdm/ckpt.pt

Writes a picture of three rows at eight noise levels: a held-out image with noise, the optimal prediction (the mean of the
training images given x_t), and the network's prediction. Any checkpoint will do.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
from edm import denoiser
from evaluate import load_like
from pdm import posterior_mean
from train import command, hold_out, load, script, seeded_noise


def blur(path, *,
         image: int = 0,             # which of the held-out images
         limit: int = 20000,         # training images in the optimal prediction
         seed: int = 0,              # seed of the noise, the same at every level
         out: str = "blur.png"):     # the picture
    """Draw the three rows and print how far apart the two predictions are."""
    method, checkpoint = load(path)
    (x, _), (held, _) = hold_out(*load_like(checkpoint, checkpoint["config"]["data"]), checkpoint["config"]["overfit"])
    if not 0 <= image < len(held):
        raise ValueError(f"--image must lie in 0..{len(held) - 1}, got {image}")
    D, device = denoiser(method), next(method.parameters()).device
    data, x_0 = pixels.to_float(x[:limit]), pixels.to_float(held[image:image + 1])
    n = seeded_noise([(seed, 0)])(x_0)
    rows, levels = ([], [], []), [0.1 * 400 ** (k / 7) for k in range(8)]                    # 0.1 to 40
    for level in levels:
        sigma = float(D.round_sigma(level))
        alpha_bar, noisy = 1 / (1 + sigma ** 2), x_0 + sigma * n
        optimal = posterior_mean(alpha_bar ** 0.5 * noisy, alpha_bar, data)
        with torch.no_grad():
            network = D(noisy.to(device), sigma).float().cpu()
        for row, picture in zip(rows, (noisy / (1 + sigma), optimal, network)):
            row.append(picture)
        steps = [(p[..., 1:] - p[..., :-1]).abs().mean().item() for p in (optimal, network)]
        print(f"sigma {sigma:7.3f}  mean step between neighbouring pixels: optimal {steps[0]:.3f}, network {steps[1]:.3f}; RMSE from the image: "
              f"optimal {(optimal - x_0).square().mean().sqrt():.3f}, network {(network - x_0).square().mean().sqrt():.3f}")
    pixels.save_grid(torch.cat([torch.cat(row) for row in rows]), out, columns=8)
    print(f"wrote {out}: {len(data):,} images in the optimal prediction")


main = script(blur, __doc__)

if __name__ == "__main__":
    command(main)
