"""Train a small classifier whose last hidden layer serves evaluate.py --frechet:

    python experiments/tools/features.py --data digits

The file it writes maps uint8 images (B, C, H, W) to vectors (B, dimensions). A distance on it
is no FID: it compares models of the same data with each other, and is blind to whatever does
not help to tell the classes apart.
"""
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from experiments.common import check_counts
from plumbing import datasets
from plumbing import device as devices
from plumbing.checkpoint import written_whole
from plumbing.drawing import check_range, make_folder
from plumbing.flags import UserError, run, script

BATCH = 100


class Net(nn.Module):
    """uint8 (B, C, H, W) -> (B, dimensions); `classify` maps these to the logits."""

    def __init__(self, channels, classes, width, dimensions):
        super().__init__()
        layers = []
        c = channels
        for k, stride in ((1, 2), (2, 1), (2, 2), (4, 1)):
            layers.append(nn.Conv2d(c, k * width, 3, stride, padding=1))
            layers.append(nn.BatchNorm2d(k * width))
            layers.append(nn.ReLU())
            c = k * width
        pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.body = nn.Sequential(*layers, *pooled, nn.Linear(4 * c, dimensions), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(0.2), nn.Linear(dimensions, classes))

    def forward(self, x):
        return self.body(x.float() / 127.5 - 1)


def features(
    *,
    data: str = "digits",  # labelled images: digits, or what train.py's --data takes
    size: tuple[int, ...] = (),  # image size, as in train.py
    channels: int | None = None,  # 1 gray, 3 colour
    flip: bool = False,  # mirror half of the images
    epochs: int = 3,  # passes over the data
    width: int = 32,  # channels of the first layer
    dimensions: int = 64,  # length of a feature vector
    lr: float = 2e-3,  # learning rate of Adam, falling to 0
    seed: int = 0,  # seed of weights and order
    out: str | None = None,  # the file; default <data>-features.pt in this folder
    device: str | None = None,  # cuda, mps or cpu
):
    """Train, test on held-out images (every 20th at random), and save as TorchScript."""
    check_counts(1, epochs=epochs, width=width, dimensions=dimensions)
    check_range("lr", lr, 0, 1)
    check_range("seed", seed, 0, 2**63)
    device = devices.pick(device)
    out = Path(out or f"{Path(data).stem}-features.pt")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out} must name a file in a folder that is there")
    make_folder(out.parent)
    images, labels, names = datasets.load(data, size or None, channels)
    if labels is None or images.is_floating_point():
        raise UserError(f"{data} has no classes to learn, or holds floats")
    if len(images) < 40:
        raise UserError(f"{data} holds {len(images)} images; it takes 40 or more")

    torch.manual_seed(seed)
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[torch.randperm(len(images))[: len(images) // 20]] = True
    net = Net(images.shape[1], len(names), width, dimensions).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    started = time.time()
    for epoch in range(epochs):
        learn(net, optimizer, images[~held_out], labels[~held_out], flip, lr, epoch, epochs)
        right = share_right(net, images[held_out], labels[held_out])
        seconds = time.time() - started
        count = int(held_out.sum())
        found = f"{right:.2%} of {count} held-out images right, {seconds:.0f} s"
        print(f"epoch {epoch + 1}: {found}", flush=True)

    about = dict(accuracy=f"{right:.2%}", trained_on=Path(data).name)
    script_net = torch.jit.script(net.eval().cpu())
    with written_whole(out) as file:
        torch.jit.save(script_net, file, _extra_files={"about.json": json.dumps(about)})
    print(f"wrote {out}; now: python evaluate.py CKPT --frechet --features {out}")


def learn(net, optimizer, images, labels, flip, lr, epoch, epochs):
    """One pass over the data, in random order."""
    device = next(net.parameters()).device
    net.train()
    batches = torch.randperm(len(images)).split(BATCH)
    for k, i in enumerate(batches):
        done = (epoch * len(batches) + k) / (epochs * len(batches))
        optimizer.param_groups[0]["lr"] = lr * (1 - done)
        x = images[i].to(device)
        if flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        F.cross_entropy(net.classify(net(x)), labels[i].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def share_right(net, images, labels):
    device = next(net.parameters()).device
    net.eval()
    guesses = [net.classify(net(x.to(device))).argmax(1).cpu() for x in images.split(500)]
    return (torch.cat(guesses) == labels).double().mean().item()


main = script(features, __doc__)

if __name__ == "__main__":
    run(main)
