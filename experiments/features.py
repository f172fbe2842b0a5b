"""Train a small classifier whose last hidden layer serves evaluate.py --frechet:  python experiments/features.py --data digits

The file it writes maps uint8 images (B, C, H, W) to vectors (B, dimensions). A distance on it is no FID: it compares models of
the same data with each other, and is blind to whatever does not help to tell the classes apart.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as pixels
from train import command, pick_device, script


class Net(nn.Module):
    """uint8 (B, C, H, W) -> (B, dimensions); `classify` maps these to the logits."""

    def __init__(self, channels, classes, width, dimensions):
        super().__init__()
        layers, c = [], channels
        for k, stride in ((1, 2), (2, 1), (2, 2), (4, 1)):
            layers += [nn.Conv2d(c, k * width, 3, stride, padding=1), nn.BatchNorm2d(k * width), nn.ReLU()]
            c = k * width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, dimensions), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(0.2), nn.Linear(dimensions, classes))

    def forward(self, x):
        return self.body(x.float() / 127.5 - 1)


def features(*,
             data: str = "digits",       # labelled images: digits, or what train.py's --data takes
             size: tuple[int, ...] = (),  # image size, as in train.py
             channels: int | None = None,  # 1 gray, 3 colour
             flip: bool = False,         # mirror half of the images
             epochs: int = 3,            # passes over the data
             width: int = 32,            # channels of the first layer
             dimensions: int = 64,       # length of a feature vector
             lr: float = 2e-3,           # learning rate of Adam, falling to 0
             seed: int = 0,              # seed of weights and order
             out: str | None = None,     # the file; default <data>-features.pt in this folder
             device: str | None = None): # cuda, mps or cpu
    """Train, test on held-out images (every 20th at random), and save as TorchScript with the accuracy inside."""
    device = pick_device(device)
    images, labels, names = pixels.load(data, size or None, channels)
    if labels is None or images.is_floating_point():
        raise ValueError(f"{data} has no classes to learn, or holds floats")
    out = Path(out or f"{Path(data).stem}-features.pt")
    if not out.parent.is_dir():
        raise ValueError(f"no such folder: {out.parent}")
    torch.manual_seed(seed)
    if epochs < 1 or len(images) < 40:
        raise ValueError(f"needs --epochs of 1 or more and 40 images or more; got {epochs} and {len(images)}")
    held = torch.zeros(len(images), dtype=torch.bool).index_fill(0, torch.randperm(len(images))[:len(images) // 20], True)
    held_images, held_labels, images, labels = images[held], labels[held], images[~held], labels[~held]
    net = Net(images.shape[1], len(names), width, dimensions).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    start, step, steps = time.time(), 0, epochs * -(-len(images) // 100)
    for epoch in range(epochs):
        for i in torch.randperm(len(images)).split(100):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = images[i].to(device)
            if flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x, x.flip(3))
            F.cross_entropy(net.classify(net(x)), labels[i].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        net.eval()
        with torch.no_grad():
            right = torch.cat([net.classify(net(x.to(device))).argmax(1).cpu() for x in held_images.split(500)]) == held_labels
        net.train()
        print(f"epoch {epoch + 1}: {right.float().mean():.2%} of {len(right)} held-out images right, {time.time() - start:.0f} s", flush=True)
    about = dict(accuracy=f"{right.float().mean():.2%}", trained_on=Path(data).name)
    torch.jit.script(net.eval().cpu()).save(f"{out}.tmp", _extra_files={"about.json": json.dumps(about)})
    os.replace(f"{out}.tmp", out)
    print(f"wrote {out}; now: python evaluate.py CKPT --frechet --features {out}")


main = script(features, __doc__)

if __name__ == "__main__":
    command(main)
