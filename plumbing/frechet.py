"""Frechet distance, precision and recall on the features of a network read from a file."""
import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .checkpoint import written_whole
from .device import rank
from .drawing import in_batches
from .flags import UserError
from .images import printable


class Features:
    """A TorchScript network that maps uint8 images (B, C, H, W) to vectors (B, D).

    about: {name: text} that its file says of it. UserError for a file without such a network.
    """

    def __init__(self, path, shape, device):
        self.path = str(path)
        self.device = device
        self.net, self.about = load_features(path, device)
        arguments = [argument.name for argument in self.net.forward.schema.arguments]
        self.options = {}
        if "return_features" in arguments:  # as a published Inception port has it
            self.options = dict(return_features=True)
        self.channels = shape[0]
        vectors = self.try_on(torch.zeros(2, *shape, dtype=torch.uint8))
        if vectors.ndim != 2 or len(vectors) != 2:
            gives = tuple(vectors.shape)
            raise UserError(f"{path} must give one vector an image, (B, D); it gives {gives}")
        self.dimensions = vectors.shape[1]
        self.name = f"Frechet distance on {Path(path).name}"
        if "inception" in Path(path).name.lower() and self.dimensions == 2048:
            self.name = "FID"

    def try_on(self, images):
        """What the network gives for images; gray ones suit a network of three channels too."""
        try:
            return self.vectors(images)
        except Exception as first_error:  # TorchScript raises many kinds
            self.channels = 3
            with contextlib.suppress(Exception):
                return self.vectors(images)
            reason = str(first_error).strip().splitlines()[-1]
            sizes = "x".join(map(str, images.shape[1:]))
            raise UserError(f"{self.path} cannot take images of {sizes}: {reason}") from None

    def vectors(self, images):
        images = images.to(self.device).expand(-1, self.channels, -1, -1)
        return self.net(images, **self.options).cpu().double()

    @torch.no_grad()
    def __call__(self, images, batch):
        """(N, D) float64, on the CPU, of uint8 images (N, C, H, W)."""
        with tqdm(desc="features", leave=False, disable=rank() > 0) as bar:

            def part(indices):
                bar.update()
                return self.vectors(images[indices])

            vectors = in_batches(part, len(images), batch)
        if not vectors.isfinite().all():
            raise UserError(f"{self.path} gives features that are not finite")
        return vectors

    def statistics(self, data, source, batch):
        """Mean (D,) and covariance (D, D) of the features of uint8 data (N, C, H, W).

        They are kept in a file beside the data's `source`, where that is a file or a folder.
        """
        key = hashlib.sha256(Path(self.path).read_bytes() + str(data.shape).encode())
        key.update(data.contiguous().numpy())
        source = Path(source).resolve()
        kept = source.with_name(f"{source.name}.{key.hexdigest()[:12]}.stats.npz")
        statistics = read_statistics(kept, self.dimensions)
        if statistics is not None:
            return statistics
        mean, covariance = moments(self(data, batch))
        if source.exists() and rank() == 0:
            try:
                with written_whole(kept) as file:
                    np.savez(file, mean=mean.numpy(), covariance=covariance.numpy())
            except UserError as error:
                print(f"note: the data's statistics could not be kept: {error}")
        return mean, covariance


def load_features(path, device):
    """The TorchScript network of a file, and what it says of itself, {name: text}."""
    extra = {"about.json": ""}
    try:
        net = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
        net.forward.schema  # noqa: B018 (an archive without a forward)
    except Exception as error:  # torch raises many kinds
        reason = (str(error).strip() or "unreadable").splitlines()[0]
        raise UserError(f"{path} is not a TorchScript network: {reason}") from error
    try:
        about = json.loads(extra["about.json"] or "{}")
        return net, {printable(k): printable(v)[:100] for k, v in about.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its about.json is no JSON object") from error


def read_statistics(path, dimensions):
    """The mean and covariance that were kept in a file, or None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean = torch.from_numpy(file["mean"])
            covariance = torch.from_numpy(file["covariance"])
    except Exception:  # no file, or a damaged one: what is kept there can be made again
        return None
    fits = mean.shape == (dimensions,) and covariance.shape == (dimensions, dimensions)
    whole = fits and mean.isfinite().all() and covariance.isfinite().all()
    return (mean, covariance) if whole else None


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians, float64."""
    root = square_root(covariance_1)
    similar = root @ covariance_2 @ root  # to S_1 S_2, and symmetric
    cross = torch.linalg.eigvalsh(similar).clamp(min=0).sqrt().sum()
    traces = covariance_1.trace() + covariance_2.trace()
    return ((mean_1 - mean_2).square().sum() + traces - 2 * cross).item()


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


# Precision and recall (Kynkaanniemi et al. 2019)

def precision_and_recall(samples, data, k=3):
    """Shares of the samples (N, D) that lie among the data (M, D), and of the data among them.

    To lie among points is to be no farther from one of them than its k-th nearest neighbour.
    """
    return share_among(samples, data, k), share_among(data, samples, k)


def share_among(x, points, k):
    radius = radii(points, k)                                           # (M,)
    inside = [(part <= radius).any(1) for part in distances(x, points)]
    return torch.cat(inside).double().mean().item()


def radii(points, k):
    """Distance of each point to its k-th nearest neighbour, (M,); a point is not its own."""
    return torch.cat([part.kthvalue(k + 1).values for part in distances(points, points)])


def distances(x, points, most=20_000_000):
    """The distances (N, M), a few rows at a time: at most so many numbers, 160 MB."""
    for part in x.split(max(1, most // len(points))):
        yield torch.cdist(part, points)
