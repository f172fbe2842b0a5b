"""Start from an image:  python edit.py runs/pdm inpaint photo.png --mask lower

    noise IMAGE            the forward process in a strip             (DDPM Eq. 4, EDM Sec. 2)
    inpaint IMAGE [MASK]   draw a part anew; the other pixels come back exactly
    invert IMAGE           the latent of which the sampler makes the image         (EDM Sec. 4)
    interpolate A B        from A to B through noise, or between latents        (DDPM Sec. 4.4)
    vary IMAGE             other images that share their x_t with it              (DDPM Fig. 7)

    python edit.py runs/pdm inpaint --help     the flags of a verb

IMAGE is a file, or the number of an image that was held out of the run's data. All methods are
edited through the denoiser D(x; sigma) of edm.py: x here is always image + sigma noise.
"""
import math
from pathlib import Path
from typing import Literal, NamedTuple

from plumbing import flags  # before torch: Ctrl-C while that loads ends without a traceback

# isort: split
import numpy as np
import torch
from PIL import Image

from edm import denoiser, ode_invert, ode_sample, sigma_steps
from plumbing import checkpoint, datasets, drawing, images
from plumbing.device import join, rank, seeded_noise
from plumbing.drawing import check_range, last
from plumbing.flags import Parser, UserError, add_flags, flags_of

RHO = 3  # of inversion and back: more of the steps at high noise than in sampling


class Picture(NamedTuple):
    """What a verb shows: images (N, C, H, W), so many in a row; a latent to keep."""

    images: torch.Tensor
    columns: int | None = None
    labels: tuple = ()
    latent: torch.Tensor | None = None


def edit(
    path,
    verb,
    words,
    options,
    *,
    class_: tuple[str, ...] = (),  # class of the image, by name or number; default none
    guidance: float | None = None,  # weight of guidance to --class; default the method's
    seed: int = 0,  # seed of all noise
    raw: bool = False,  # use the weights as trained, not their average
    out: str | None = None,  # the picture, a .png; default in the run, named by its flags
    device: str | None = None,  # cuda, mps or cpu; default the first that is there
):
    """Write the picture of `verb` under its `options` (a dict); the path that was written.

    words: the images, and for inpaint perhaps a mask. UserError for what cannot be, before any
    work.
    """
    function = VERBS[verb]
    parameters = flags_of(function) | flags_of(edit)
    made_by = options | dict(class_=class_, guidance=guidance, raw=raw)
    options = {name: p.default for name, p in flags_of(function).items()} | options
    check_options(verb, words, options, class_)
    check_range("seed", seed, 0, 2**63)
    method, saved = checkpoint.load(path, ema=not raw, device=device)
    where = next(method.parameters()).device
    n = options.get("n", 1)
    y = drawing.choose_labels(n, class_, saved["classes"]) if class_ else None
    if guidance is not None and saved["classes"] and not class_:
        raise UserError("--guidance needs --class: without a class nothing is guided to")
    w = drawing.choose_guidance(method, guidance, y)
    y = None if y is None else y.to(where)
    inputs = [one.to(where) for one in read_words(verb, words, saved)]
    name = drawing.picture_name(saved, [verb, *words, f"seed{seed}"], made_by, parameters)
    named = out is not None
    out = Path(out) if named else drawing.run_folder(path) / "samples" / f"{name}.png"
    outputs = [out]
    drawing.prepare(out, ".png", named)
    if verb == "invert":
        outputs.append(out.with_suffix(".npy"))
        drawing.prepare(outputs[1], ".npy", named)

    with torch.no_grad(), drawing.counted(method, n) as cost, drawing.guided(method, w):
        picture = function(method, inputs, y, seed, **options)
    print(f"{verb}: {cost}" + drawing.guidance_note(y, w))
    if rank() == 0:
        images.save_grid(picture.images.float().cpu(), out, picture.columns, picture.labels)
        if picture.latent is not None:
            with checkpoint.written_whole(outputs[1]) as file:
                np.save(file, picture.latent.cpu().numpy())
        print("wrote " + " and ".join(map(str, outputs)))
    return out


def check_options(verb, words, options, class_):
    """UserError for words and values that do not suit the verb."""
    for flag, low, high in (("n", 1, 10_000), ("resample", 1, 1000), ("steps", 2, 10**6)):
        check_range(flag, options.get(flag, low), low, high)
    if not 0 < options.get("at", 1) <= 1:
        raise UserError(f"--at must lie above 0, up to 1, got {options['at']:g}")
    if len(class_) > 1:
        raise UserError("--class takes one class here")
    if verb == "inpaint":
        if len(words) + (options["mask"] is not None) != 2 or not words:
            raise UserError("inpaint takes an image, and --mask lower or the file of a mask")
    elif verb == "interpolate":
        if len(words) != 2:
            raise UserError(f"interpolate takes two images, got {len(words)}")
    elif len(words) != 1:
        raise UserError(f"{verb} takes one image, got {len(words)}")


# The verbs: (method, what `read_words` gives, classes (n,) or None, seed) -> a Picture

def noise(method, inputs, y, seed):
    """The image under ever more of the same noise; below, what the denoiser makes of it."""
    (x_0,) = inputs
    D = denoiser(method)
    low, high = max(0.05, D.sigma_min), min(20.0, D.sigma_max)
    eps = seeded_noise([(seed, 0)])(x_0)
    noisy = []
    denoised = []
    for k in range(8):
        sigma = float(D.round_sigma(low * (high / low) ** (k / 7)))
        x = x_0 + sigma * eps  # EDM Sec. 2
        noisy.append(x / (1 + sigma))  # to be seen
        denoised.append(D(x, sigma, y))
    return Picture(torch.cat(noisy + denoised), columns=8, labels=("x", "x_0"))


def inpaint(
    method,
    inputs,
    y,
    seed,
    *,
    mask: Literal["lower", "upper", "left", "right", "center"] | None = None,  # to draw anew
    n: int = 8,  # pictures to draw
    steps: int = 50,  # time steps
    resample: int = 5,  # times that each step is taken; more make the new part fit better
):
    """The image, what is kept of it, and n ways to fill in the rest."""
    x_0 = inputs[0]
    hidden = part_of(x_0, mask) if mask is not None else inputs[1]
    randn_like = seeded_noise([(seed, i) for i in range(n)])
    copies = x_0.expand(n, -1, -1, -1)
    filled = fill_in(denoiser(method), copies, hidden, y, steps, resample, randn_like)
    return Picture(torch.cat([x_0, x_0.masked_fill(hidden, 0), filled]))


def invert(
    method,
    inputs,
    y,
    seed,
    *,
    steps: int = 50,  # time steps
):
    """The image, its latent, and what the deterministic sampler makes of that."""
    (x_0,) = inputs
    D = denoiser(method)
    z = ode_invert(D, x_0, y, steps=steps, rho=RHO)
    back = last(ode_sample(D, z, y, steps=steps, rho=RHO))
    error = 127.5 * (back - x_0).square().mean().sqrt()
    print(f"latent of std {z.std():.3f}; reconstructed to {error:.2f} of 255 (RMSE)")
    return Picture(torch.cat([x_0, z / 2, back]), columns=3, latent=z)


def interpolate(
    method,
    inputs,
    y,
    seed,
    *,
    at: float = 0.5,  # how far along the chain to go into the noise, 0 to 1
    latent: bool = False,  # between inverted latents, on the sphere
    n: int = 8,  # pictures between the two images
    steps: int = 50,  # time steps
):
    """The first image, n on the way to the second, and the second: latents are mixed."""
    a, b = inputs
    if latent:
        between = between_latents(denoiser(method), a, b, y, n, steps)
    else:
        between = between_noisy(method, a, b, y, n, steps, at, seed)
    return Picture(torch.cat([a, between, b]), columns=n + 2)


def vary(
    method,
    inputs,
    y,
    seed,
    *,
    at: float = 0.5,  # how far along the chain to go into the noise, 0 to 1
    n: int = 8,  # pictures to draw
    steps: int = 50,  # time steps
):
    """The image, and n that come out of the same x_t by different noise in the chain."""
    (x_0,) = inputs
    sigma, back = way_back(method, at, steps)
    x = x_0 + sigma * seeded_noise([(seed, 10**6)])(x_0)
    randn_like = seeded_noise([(seed, i) for i in range(n)])
    varied = back(x.expand(n, -1, -1, -1), y, randn_like)  # DDPM Fig. 7
    return Picture(torch.cat([x_0, varied]))


VERBS = {
    "noise": noise,
    "inpaint": inpaint,
    "invert": invert,
    "interpolate": interpolate,
    "vary": vary,
}


# How they are done

def fill_in(D, x_0, hidden, y, steps, resample, randn_like):
    """x_0 (n, C, H, W) with the pixels that are `hidden`, (1, 1, H, W), drawn anew.

    At each level the known part is the image under fresh noise of that level; each step is
    taken `resample` times, going back up in between, so that both parts come to agree (RePaint,
    Lugmayr et al. 2022).
    """
    low, high = max(0.002, D.sigma_min), min(80.0, D.sigma_max)
    levels = sigma_steps(steps, sigma_min=low, sigma_max=high)
    sigmas = [float(D.round_sigma(sigma)) for sigma in levels] + [0.0]
    x = sigmas[0] * randn_like(x_0)
    for sigma, lower in zip(sigmas, sigmas[1:]):
        times = resample if lower > 0 else 1
        for left in reversed(range(times)):
            x = torch.where(hidden, x, x_0 + sigma * randn_like(x_0))
            x = x + (lower - sigma) * (x - D(x, sigma, y)) / sigma  # EDM Algorithm 1, Euler
            if left > 0:
                x = x + (sigma**2 - lower**2) ** 0.5 * randn_like(x_0)
    return torch.where(hidden, x, x_0)


def between_latents(D, a, b, y, n, steps):
    """n images on the way from a to b, each (1, C, H, W), along the sphere of latents."""
    one = None if y is None else y[:1]
    z_a = ode_invert(D, a, one, steps=steps, rho=RHO)
    z_b = ode_invert(D, b, one, steps=steps, rho=RHO)
    cosine = (z_a * z_b).sum() / (z_a.norm() * z_b.norm())
    if cosine > 1 - 1e-6:
        raise UserError("both images have the same latent: there is nothing between them")
    angle = torch.acos(cosine)
    share = torch.linspace(0, 1, n, device=a.device).view(-1, 1, 1, 1)
    z = torch.sin((1 - share) * angle) * z_a + torch.sin(share * angle) * z_b
    return last(ode_sample(D, z / torch.sin(angle), y, steps=steps, rho=RHO))


def between_noisy(method, a, b, y, n, steps, at, seed):
    """n images on the way from a to b, each (1, C, H, W), mixed under noise; DDPM Sec. 4.4."""
    sigma, back = way_back(method, at, steps)
    eps_a, eps_b = seeded_noise([(seed, 0), (seed, 1)])(torch.cat([a, b])).split(1)
    share = torch.linspace(0, 1, n, device=a.device).view(-1, 1, 1, 1)
    x = (1 - share) * (a + sigma * eps_a) + share * (b + sigma * eps_b)
    return back(x, y, seeded_noise([(seed, 2)] * n))  # the noise of the chain alike


def way_back(method, at, steps):
    """The noise level `at` (0 to 1) of the way along the method's own chain, and its way back.

    back(x, y, randn_like): images (B, C, H, W) under noise of that level -> images. Of a method
    with a chain of t, its own sampler from that t; of others EDM's stochastic sampler, with as
    much fresh noise as the reverse SDE has, dt / t a step.
    """
    if hasattr(method, "kept_steps"):
        t = max(1, round(at * method.T))
        alpha_bar = method.alpha_bar[t]
        kept = sorted({max(1, round(1 + (t - 1) * k / (steps - 1))) for k in range(steps)})

        def back(x, y, randn_like):
            x_t = alpha_bar.sqrt().to(x.dtype) * x
            return last(method.sample(x_t, y, steps=kept, randn_like=randn_like))

        return ((1 - alpha_bar) / alpha_bar).sqrt().item(), back

    D = denoiser(method)
    low, high = max(0.002, D.sigma_min), min(80.0, D.sigma_max)
    levels = sigma_steps(1001, sigma_min=low, sigma_max=high)
    sigma = levels[min(999, round(1000 * (1 - at)))].item()
    churn = math.log(sigma / low)

    def back(x, y, randn_like):
        options = dict(steps=steps, sigma_max=sigma, S_churn=churn, randn_like=randn_like)
        return last(ode_sample(D, x / sigma, y, **options))

    return sigma, back


# What the words name

def read_words(verb, words, saved):
    """The images, (1, C, H, W) in [-1, 1], and the mask, (1, 1, H, W) bool, that words name."""
    pictured = words[:1] if verb == "inpaint" else words
    held_out = []
    if any(word.isdecimal() for word in pictured):
        data = datasets.load_like(saved, saved["config"]["data"])
        held_out = datasets.hold_out(*data, saved["config"]["overfit"])[1][0]
    inputs = [read_image(word, saved, held_out) for word in pictured]
    if len(words) > len(pictured):
        inputs.append(read_mask(words[1], saved["shape"][1:]))
    return inputs


def read_image(word, saved, held_out):
    """A file, cropped and resized to the run's shape, or the number of a held-out image."""
    channels, *size = saved["shape"]
    if word.isdecimal():
        if int(word) >= len(held_out):
            raise UserError(f"there is no image {word}: {len(held_out)} were held out")
        return images.to_float(held_out[int(word)][None])
    if saved["latents"]:
        raise UserError("this model was trained on latents: name a held-out one by its number")
    picture = images.open_image(word)
    if picture.size != tuple(reversed(size)):
        is_now = f"{picture.width}x{picture.height}; cropped about its centre and resized"
        print(f"note: {word} is {is_now} to {size[1]}x{size[0]}")
    mode = "L" if channels == 1 else "RGB"
    pixels = np.array(images.fit(images.to_rgb(picture), tuple(size)).convert(mode))
    x = torch.from_numpy(pixels).reshape(*size, -1).permute(2, 0, 1)
    return images.to_float(x[None])


def read_mask(word, size):
    """Where to draw anew: the pixels of a picture that are lighter than middle gray."""
    picture = images.open_image(word)
    if picture.size != tuple(reversed(size)):
        is_now = f"{picture.width}x{picture.height}; resized to {size[1]}x{size[0]}"
        print(f"note: the mask is {is_now}")
    gray = images.to_rgb(picture).convert("L").resize((size[1], size[0]), Image.NEAREST)
    hidden = torch.from_numpy(np.array(gray)) > 127
    if hidden.all():
        raise UserError(f"the mask {word} is all white: nothing is kept")
    if not hidden.any():
        raise UserError(f"the mask {word} is all black: nothing is drawn")
    return hidden[None, None]


def part_of(x_0, name):
    """The mask (1, 1, H, W) of a half of the image, or of its middle."""
    H, W = x_0.shape[2:]
    rows, columns = {
        "lower": (slice(H // 2, H), slice(W)),
        "upper": (slice(H // 2), slice(W)),
        "left": (slice(H), slice(W // 2)),
        "right": (slice(H), slice(W // 2, W)),
        "center": (slice(H // 4, H - H // 4), slice(W // 4, W - W // 4)),
    }[name]
    hidden = torch.zeros(1, 1, H, W, dtype=torch.bool, device=x_0.device)
    hidden[:, :, rows, columns] = True
    return hidden


# The command line

def main(argv):
    join()
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if len(argv) < 2 or argv[1] not in VERBS:
        got = " ".join(argv[1:2]) or "nothing"
        raise UserError(f"after the run comes one of {', '.join(VERBS)}; got {got}")
    path, verb, *rest = argv
    usage = f"python edit.py RUN {verb} IMAGE ... [flags]"
    parser = Parser(prog="edit.py", usage=usage, description=VERBS[verb].__doc__)
    parser.add_argument("words", nargs="*", metavar="IMAGE", help="a file, or a number")
    names = add_flags(parser, verb, VERBS[verb])
    add_flags(parser, "every verb", edit)
    given = parser.parse(rest, hints_of_other_verbs(verb))
    words = given.pop("words")
    options = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    edit(path, verb, words, options, **others)


def hints_of_other_verbs(verb):
    """{flag: sentence} of the flags that other verbs have."""
    hints = {}
    for flag in {flag for function in VERBS.values() for flag in flags_of(function)}:
        owners = [name for name, function in VERBS.items() if flag in flags_of(function)]
        hints[flag] = f"--{flag} goes with {', '.join(owners)}, not with {verb}"
    return hints


if __name__ == "__main__":
    flags.run(main)
