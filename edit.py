"""Start from an image:  python edit.py runs/pdm/ckpt.pt noise photo.png

    noise IMAGE           the forward process in a strip                                        (DDPM Eq. 4, EDM Sec. 2)
    inpaint IMAGE MASK    draw anew what is white in MASK; the other pixels come back exactly
    invert IMAGE          the latent from which the deterministic sampler returns the image     (EDM Sec. 4)
    interpolate A B       from A to B through the noise at --at, or on the sphere of latents    (DDPM Sec. 4.4)
    vary IMAGE            other images that share their x_t, at --at, with it                   (DDPM Fig. 7)

IMAGE is a file, or the number of an image that was held out of the run's data. All five methods, through the denoiser D(x; sigma)
of edm.py: x here is always image + sigma noise. Flags are the keyword arguments of `edit` below.
"""
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

import data as pixels
from edm import EDM, denoiser, nearest, ode_invert, ode_sample, sigma_steps
from evaluate import load_like
from sample import Cost, choose_labels, guide
from train import Parser, add_flags, command, hold_out, load, seeded_noise

FLAGS = dict(noise=(1, set()), inpaint=(2, {"resample", "n", "steps"}), invert=(1, {"steps"}), interpolate=(2, {"at", "latent", "n", "steps"}),
             vary=(1, {"at", "n", "steps"}))  # verb: number of images, and which flags only some verbs have


def edit(path, verb, sources, *,
         at: float = 0.5,            # interpolate, vary: how far along the chain to go into the noise, 0 to 1
         latent: bool = False,       # interpolate: between inverted latents, on the sphere
         resample: int = 5,          # inpaint: times that each step is taken; more make the new part fit better
         n: int = 8,                 # inpaint, interpolate, vary: pictures to draw
         steps: int = 50,            # time steps
         class_: tuple[str, ...] = (),  # class of the image, by name or number, for a conditional model
         guidance: float | None = None,  # weight of classifier-free guidance
         seed: int = 0,              # seed of all noise
         raw: bool = False,          # use the weights as trained, not their average
         out: str | None = None,     # the picture, a .png; default <run>/samples/<verb>.png
         device: str | None = None): # cuda, mps or cpu; default the first of them that is there
    """Write the picture of `verb`. Raises ValueError before any work."""
    if n < 1 or resample < 1 or steps < 2 or not 0 < at <= 1:
        raise ValueError(f"needs --n and --resample of 1 or more, --steps of 2 or more and --at above 0, up to 1; got {n}, {resample}, {steps}, {at:g}")
    if len(class_) > 1:
        raise ValueError("--class takes one class here")
    method, checkpoint = load(path, ema=not raw, device=device)
    D, device = denoiser(method), next(method.parameters()).device
    out = Path(out or Path(path).parent / "samples" / f"{verb}.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png")
    if class_ or guidance is not None:
        guide(method, guidance, choose_labels(1, class_, checkpoint["classes"]))
    y = choose_labels(n, class_, checkpoint["classes"]).to(device) if class_ else None    # else the null class
    pictured = sources[:1] if verb == "inpaint" else sources
    held = held_out(checkpoint) if any(source.isdigit() for source in pictured) else []
    images = [read_image(source, checkpoint, held).to(device) for source in pictured]
    noise = seeded_noise([(seed, i) for i in range(n)])
    one = None if y is None else y[:1]
    if verb == "inpaint":
        mask = read_mask(sources[1], checkpoint["shape"][1:]).to(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Cost(method, n if verb in ("inpaint", "interpolate", "vary") else 1) as cost:
        if verb == "noise":
            rows, labels, columns = [noised(D, images[0], seed)], ["x", "x_0"], 8
            rows.append(torch.cat([D(x, sigma, one) for x, sigma in zip(rows[0].split(1), levels(D))]))
            rows[0] = rows[0] / (1 + torch.tensor(levels(D), device=device).view(-1, 1, 1, 1))      # to be seen
        elif verb == "inpaint":
            rows, labels, columns = [images[0], torch.where(mask, 0, images[0]), inpaint(D, images[0], mask, noise, y, steps, resample, n)], (), None
        elif verb == "invert":
            z = ode_invert(D, images[0], one, steps=steps, rho=3)
            back = draw(ode_sample(D, z, one, steps=steps, rho=3))
            np.save(out.with_suffix(".npy"), z.cpu().numpy())
            print(f"latent, std {z.std():.3f}, in {out.with_suffix('.npy')}; reconstructed to {127.5 * (back - images[0]).square().mean().sqrt():.2f} of 255 (RMSE)")
            rows, labels, columns = [images[0], z / 2, back], (), 3
        elif verb == "interpolate":
            rows, labels, columns = [images[0], interpolate(method, *images, at, latent, seed, y, steps, n), images[1]], (), n + 2
        else:
            rows, labels, columns = [images[0], vary(method, images[0], at, noise, seed, y, steps, n)], (), None
    cost.says("pictures")
    pixels.save_grid(torch.cat([row.float().cpu() for row in rows]), out, columns, labels)
    print(f"wrote {out}")


def held_out(checkpoint):
    """The images that were held out of the run's data, (N, C, H, W)."""
    return hold_out(*load_like(checkpoint, checkpoint["config"]["data"]), checkpoint["config"]["overfit"])[1][0]


def read_image(source, checkpoint, held):
    """(1, C, H, W) in [-1, 1], of the checkpoint's shape: a file, cropped and resized to it, or the number of a held-out image."""
    C, *size = checkpoint["shape"]
    if source.isdigit():
        if int(source) >= len(held):
            raise ValueError(f"there is no image {source}: {len(held)} were held out")
        return pixels.to_float(held[int(source)][None])
    if checkpoint.get("latents"):
        raise ValueError("this model was trained on latents: name a held-out one by its number")
    picture = open_image(source)
    if picture.size != tuple(size[::-1]):
        print(f"note: {source} is {picture.width}x{picture.height}; cropped about its centre and resized to {size[1]}x{size[0]}")
    x = torch.tensor(np.asarray(pixels.fit(pixels.to_rgb(picture), tuple(size)).convert("L" if C == 1 else "RGB")))
    return pixels.to_float(x[None, None] if C == 1 else x.permute(2, 0, 1)[None])


def read_mask(source, size):
    """(1, 1, H, W), True where to draw anew: the pixels of a picture lighter than middle gray."""
    picture = open_image(source)
    if picture.size != tuple(size[::-1]):
        print(f"note: the mask is {picture.width}x{picture.height}; resized to {size[1]}x{size[0]}")
    mask = torch.tensor(np.asarray(pixels.to_rgb(picture).convert("L").resize(size[::-1], Image.NEAREST)) > 127)
    if mask.all() or not mask.any():
        raise ValueError(f"the mask {source} is all {'white: nothing is kept' if mask.all() else 'black: nothing is drawn'}")
    return mask[None, None]


def open_image(source):
    try:
        picture = Image.open(source)
        picture.load()
        return picture
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"cannot read {source}: {error}")


def draw(chain):
    for x, _ in chain:
        pass
    return x


def levels(D, n=8):
    """Noise levels from almost none to so much that nothing is left, evenly spaced in log sigma."""
    low, high = max(0.05, D.sigma_min), min(20.0, D.sigma_max)
    return [float(D.round_sigma(low * (high / low) ** (k / (n - 1)))) for k in range(n)]


def noised(D, x_0, seed):
    """The image under ever more of the same noise, (8, C, H, W)."""
    eps = seeded_noise([(seed, 0)])(x_0)
    return torch.cat([x_0 + sigma * eps for sigma in levels(D)])                          # EDM Sec. 2


@torch.no_grad()
def inpaint(D, x_0, mask, randn_like, y, steps, resample, n):
    """n ways (n, C, H, W) to fill in mask. At each level the known part is the image under fresh noise of that level; each
    step is taken `resample` times, going back up in between, so that both parts come to agree (RePaint, Lugmayr 2022)."""
    sigmas = [float(D.round_sigma(s)) for s in sigma_steps(steps, sigma_min=max(0.002, D.sigma_min), sigma_max=min(80, D.sigma_max))] + [0.0]
    x_0 = x_0.expand(n, -1, -1, -1)
    x = sigmas[0] * randn_like(x_0)
    for sigma, lower in zip(sigmas, sigmas[1:]):
        for again in reversed(range(resample if lower > 0 else 1)):
            x = torch.where(mask, x, x_0 + sigma * randn_like(x_0))
            x = x + (lower - sigma) * (x - D(x, sigma, y)) / sigma                        # an Euler step of EDM's Algorithm 1
            if again:
                x = x + (sigma ** 2 - lower ** 2) ** 0.5 * randn_like(x_0)
    return torch.where(mask, x, x_0)


def level_at(method, at):
    """The noise level that lies `at` (0 to 1) of the way along the method's own chain."""
    if not isinstance(method, EDM):
        return denoiser(method).sigma[max(1, round(at * method.T)) - 1].item()
    return sigma_steps(1001)[round(1000 * (1 - at))].item()


def finish(method, x, sigma, y, steps, randn_like):
    """From images under noise of level sigma to images: DDPM's ancestral chain from that t, or EDM's stochastic sampler with
    about as much fresh noise as the reverse SDE has, dt / t a step."""
    if isinstance(method, EDM):
        return draw(ode_sample(method, x / sigma, y, steps=steps, sigma_max=sigma, randn_like=randn_like, S_churn=math.log(sigma / 0.002)))
    t = 1 + nearest(denoiser(method).sigma, sigma).item()
    tau = sorted({max(1, round(1 + (t - 1) * k / (steps - 1))) for k in range(steps)})
    return draw(method.sample(method.alpha_bar[t].sqrt().to(x.dtype) * x, y, steps=tau, randn_like=randn_like))


def interpolate(method, a, b, at, latent, seed, y, steps, n):
    """n images (n, C, H, W) on the way from a to b: latents are mixed, not images."""
    lam = torch.linspace(0, 1, n, device=a.device).view(-1, 1, 1, 1)
    if latent:
        D, one = denoiser(method), None if y is None else y[:1]
        z_a, z_b = (ode_invert(D, x, one, steps=steps, rho=3) for x in (a, b))
        angle = torch.acos((z_a * z_b).sum() / (z_a.norm() * z_b.norm()))
        z = (torch.sin((1 - lam) * angle) * z_a + torch.sin(lam * angle) * z_b) / torch.sin(angle)
        return draw(ode_sample(D, z, y, steps=steps, rho=3))
    sigma, eps = level_at(method, at), seeded_noise([(seed, 0), (seed, 1)])(torch.cat([a, b]))
    x_a, x_b = a + sigma * eps[:1], b + sigma * eps[1:]
    return finish(method, (1 - lam) * x_a + lam * x_b, sigma, y, steps, seeded_noise([(seed, 2)] * n))  # DDPM Sec. 4.4, the chain's noise alike


def vary(method, x_0, at, noise, seed, y, steps, n):
    """n images (n, C, H, W) that come out of the same x_t by different noise in the chain."""
    sigma = level_at(method, at)
    x = x_0 + sigma * seeded_noise([(seed, 10 ** 6)])(x_0)
    return finish(method, x.expand(n, -1, -1, -1), sigma, y, steps, noise)                # DDPM Fig. 7


def main(argv):
    parser = Parser(prog="edit.py", usage="python edit.py CKPT noise|inpaint|invert|interpolate|vary IMAGE ... [flags]", description=__doc__)
    parser.add_argument("path", help="the checkpoint")
    parser.add_argument("verb", choices=FLAGS)
    parser.add_argument("sources", nargs="*", help="images")
    add_flags(parser, "editing", edit)
    if not argv:
        return print(__doc__)
    given = parser.parse(argv, "edit.py")
    path, verb, sources = given.pop("path"), given.pop("verb"), list(given.pop("sources"))
    count, flags = FLAGS[verb]
    if len(sources) != count:
        raise ValueError(f"{verb} takes {'an image and a mask' if verb == 'inpaint' else 'two images' if count == 2 else 'one image'}, got {len(sources)}")
    for flag in given:
        owners = [name for name, (_, own) in FLAGS.items() if flag in own]
        if owners and verb not in owners:
            raise ValueError(f"--{flag} goes with {', '.join(owners)}, not with {verb}")
    with torch.no_grad():
        edit(path, verb, sources, **given)


if __name__ == "__main__":
    command(main)
