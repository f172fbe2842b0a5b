"""The GPU computes what the CPU does."""
import copy

import pytest
import torch
from conftest import last

from train import METHODS
from unet import UNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA GPU with the CPU, and none is here")


@pytest.fixture
def exact(monkeypatch):  # float32 that is float32, and the same random numbers on both devices
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("randn_like", "randint"):
        on_cpu = getattr(torch, name)
        def draw(*args, device=None, on_cpu=on_cpu, **kw):
            device = device or next(a.device for a in args if torch.is_tensor(a))
            return on_cpu(*(a.cpu() if torch.is_tensor(a) else a for a in args), **kw).to(device)
        monkeypatch.setattr(torch, name, draw)


def pair(name):
    method = METHODS[name](lambda i, o: UNet(i, o, width=32), 3, T=100, **({"patch": 2} if name == "pdm" else {}))
    for p in method.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return method, copy.deepcopy(method).cuda()


@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_loss_and_gradients(name, exact):
    results, x = [], torch.rand(8, 3, 16, 16) * 2 - 1
    for method in pair(name):
        torch.manual_seed(1)
        loss = method.loss(x.to(method.alpha_bar.device))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in method.parameters()])))
    (a, grad_a), (b, grad_b) = results
    assert abs(a - b) < 1e-4 * abs(a) and (grad_a - grad_b).norm() < 1e-3 * grad_a.norm()


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_cuda_cpu_parity_of_the_samplers(name, eta, exact):
    noise = torch.randn(4, 3, 16, 16)
    tape = torch.randn(20, 4, 3, 16, 16)
    results = []
    for method in pair(name):
        z = iter(tape)
        results.append(last(method.eval().sample(noise.to(method.alpha_bar.device), steps=20, eta=eta, randn_like=lambda x: next(z).to(x))).cpu())
    assert (results[0] - results[1]).abs().max() < 1e-2
