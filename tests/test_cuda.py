"""The GPU computes what the CPU does."""
import copy
import functools

import pytest
import torch
from conftest import last

from edm import denoiser, ode_sample
from train import METHODS
from unet import UNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA GPU with the CPU, and none is here")


@pytest.fixture
def exact(monkeypatch):  # float32 that is float32, and the same random numbers on both devices
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("randn_like", "randint", "rand", "randn"):
        on_cpu = getattr(torch, name)
        def draw(*args, device=None, on_cpu=on_cpu, **kw):
            device = device or next((a.device for a in args if torch.is_tensor(a)), "cpu")
            return on_cpu(*(a.cpu() if torch.is_tensor(a) else a for a in args), **kw).to(device)
        monkeypatch.setattr(torch, name, draw)


def pair(name):
    method = METHODS[name](lambda i, o: UNet(i, o, width=32), 3, **{"pdm": dict(T=100, patch=2), "edm": {}}.get(name, dict(T=100)))
    for p in method.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return method, copy.deepcopy(method).cuda()


@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_loss_and_gradients(name, exact):
    results, x = [], torch.rand(8, 3, 16, 16) * 2 - 1
    for method in pair(name):
        torch.manual_seed(1)
        loss = method.loss(x.to(next(method.parameters()).device))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in method.parameters()])))
    (a, grad_a), (b, grad_b) = results
    assert abs(a - b) < 1e-4 * abs(a) and (grad_a - grad_b).norm() < 1e-3 * grad_a.norm()


@pytest.mark.parametrize("options", [{}, dict(eta=0.0), dict(eta=1.0), dict(sampler=ode_sample), dict(sampler=ode_sample, S_churn=9.0)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_the_samplers(name, options, exact):
    if name == "edm" and "eta" in options:
        pytest.skip("eta is DDIM's, and EDM has none")
    noise = torch.randn(4, 3, 16, 16)
    tape = torch.randn(20, 4, 3, 16, 16)
    results = []
    for method in pair(name):
        z, kw = iter(tape), dict(options)
        run = functools.partial(kw.pop("sampler"), denoiser(method)) if "sampler" in kw else method.sample
        device = next(method.eval().parameters()).device
        results.append(last(run(noise.to(device), steps=20, randn_like=lambda x: next(z).to(x), **kw)).cpu())
    assert (results[0] - results[1]).abs().max() < 1e-2
