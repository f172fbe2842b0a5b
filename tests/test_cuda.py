"""The GPU computes what the CPU does."""
import copy
import functools

import pytest
import torch
from explain import holds
from helpers import last

from edm import denoiser, ode_sample
from plumbing.checkpoint import METHODS
from plumbing.flags import flags_of
from unet import UNet

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares a CUDA GPU with the CPU, and none is here"
)


def drawn_on_the_cpu(function):
    """torch.randn and its like, with the same numbers on every device."""

    def draw(*arguments, device=None, **options):
        tensors = [a for a in arguments if torch.is_tensor(a)]
        if device is None:
            device = tensors[0].device if tensors else "cpu"
        on_cpu = [a.cpu() if torch.is_tensor(a) else a for a in arguments]
        return function(*on_cpu, **options).to(device)

    return draw


@pytest.fixture
def exact(monkeypatch):
    """float32 that is float32, and the same random numbers on both devices."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("randn_like", "randint", "rand", "randn"):
        monkeypatch.setattr(torch, name, drawn_on_the_cpu(getattr(torch, name)))


def pair(name):
    """The method on the CPU, and its copy on the GPU."""
    small = {"T": 100, "patch": (2,)}
    options = {flag: small[flag] for flag in small if flag in flags_of(METHODS[name])}
    method = METHODS[name](lambda i, o: UNet(i, o, width=32), 3, **options)
    for weight in method.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return method, copy.deepcopy(method).cuda()


def where(method):
    return next(method.parameters()).device


@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_loss_and_gradients(name, exact):
    losses = []
    gradients = []
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    for method in pair(name):
        torch.manual_seed(1)
        loss = method.loss(x.to(where(method)))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in method.parameters()]))
    apart = abs(losses[0] - losses[1]) / abs(losses[0])
    holds(apart < 1e-4, "the losses agree to 1e-4", apart=apart)
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    holds(apart < 1e-3, "the gradients agree to 1e-3", apart=apart)


@pytest.mark.parametrize("sampler, options", [
    ("own", {}),
    ("own", {"eta": 0.0}),
    ("own", {"eta": 1.0}),
    ("general", {}),
    ("general", {"S_churn": 9.0}),
])
@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_the_samplers(name, sampler, options, exact):
    if "eta" in options and "eta" not in flags_of(METHODS[name].sample):
        pytest.skip(f"eta is DDIM's, and {name} has none")
    noise = torch.randn(4, 3, 16, 16)
    tape = torch.randn(20, 4, 3, 16, 16)
    drawn = []
    for method in pair(name):
        method.eval()
        run = method.sample
        if sampler == "general":
            run = functools.partial(ode_sample, denoiser(method))
        draws = iter(tape)
        randn_like = functools.partial(next_draw, draws)
        chain = run(noise.to(where(method)), steps=20, randn_like=randn_like, **options)
        drawn.append(last(chain).cpu())
    apart = (drawn[0] - drawn[1]).abs().max().item()
    holds(apart < 1e-2, "the samples agree to 0.01", apart=apart)


def next_draw(draws, x):
    return next(draws).to(x)
