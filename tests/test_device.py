import types

import numpy as np
import pytest
import torch
from torch import nn

from plumbing import device as devices
from plumbing.flags import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["quantum", "meta", "cuda:99", "cpu:x", "xla", ":"])
def test_a_device_that_is_not_here_is_one_line(name):
    with pytest.raises(UserError, match="no device") as error:
        devices.pick(name)
    assert "\n" not in str(error.value)


def test_the_first_device_that_is_there_is_picked(monkeypatch):
    assert devices.pick("cpu") == CPU
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert devices.first_there() == "cuda"
    there["cuda"] = False
    assert devices.first_there() == "mps"
    there["mps"] = False
    assert devices.first_there() == "cpu"


@pytest.mark.parametrize(
    "device, has, expected",
    [
        (CUDA, (8, 0), "bf16"),
        (CUDA, (9, 0), "bf16"),
        (CUDA, (7, 5), "fp32"),
        (CPU, {"avx512_bf16": True}, "bf16"),
        (CPU, {"avx512_bf16": False}, "fp32"),
        (CPU, {"architecture": "aarch64"}, "fp32"),
        (torch.device("mps"), None, "fp32"),
    ],
)
def test_auto_is_bf16_where_hardware_multiplies_in_it(monkeypatch, device, has, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert devices.precision_on(device, "auto") == expected
    assert devices.precision_on(device, "fp32") == "fp32"
    assert devices.precision_on(device, "bf16") == "bf16"


def test_auto_is_fp32_where_torch_does_not_know_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.precision_on(CPU, "auto") == "fp32"


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_runs_networks_in_the_precision_asked_for(precision, dtype):
    with devices.autocast(CPU, precision):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_weights_are_channels_last_and_without_float64_on_mps(monkeypatch):
    moved = devices.to_device(nn.Conv2d(4, 4, 3), CPU)
    assert moved.weight.is_contiguous(memory_format=torch.channels_last)
    method = nn.Conv2d(4, 4, 3).double()
    monkeypatch.setattr(method, "to", lambda device: method)
    assert devices.to_device(method, torch.device("mps")).weight.dtype == torch.float32


@pytest.mark.parametrize("free, fits", [(10_000, True), (200, False)])
def test_images_lie_on_a_gpu_where_they_take_less_than_half_of_it(monkeypatch, free, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10 ** 6))
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert devices.images_fit(images, CUDA) is fits
    assert devices.images_fit(images, CPU)


@pytest.mark.parametrize("kind, steps, triton, expected", [
    ("cuda", 20_000, True, True),
    ("cuda", 19_999, True, False),
    ("cuda", 20_000, False, False),
    ("cpu", 10 ** 6, True, False),
])
def test_long_runs_on_cuda_are_compiled_unasked(monkeypatch, kind, steps, triton, expected):
    find = types.SimpleNamespace(find_spec=lambda _: triton or None)
    monkeypatch.setattr(devices.importlib, "util", find)
    assert devices.compiles(None, torch.device(kind), steps) is expected
    assert devices.compiles(True, CPU, 1) is True
    assert devices.compiles(False, CUDA, 10 ** 6) is False


def test_a_seed_depends_on_the_whole_key():
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (2 ** 63, 5, 1)]
    seeds = [devices.seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [devices.seed_of(*key) for key in keys]
    expected = np.random.SeedSequence((0, 0, 1)).generate_state(1, np.uint64)[0] >> 1
    assert seeds[0] == expected


def test_noise_of_an_image_depends_on_its_key_alone():
    both = devices.seeded_noise([(0, 0), (0, 1)])
    second = devices.seeded_noise([(0, 1)])
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(2):  # step after step
        assert torch.equal(both(x)[1], second(x[1:])[0])
    assert both(x).dtype == torch.float64


def test_alone_a_process_is_the_first_of_one_and_agrees_with_itself():
    devices.join()
    assert (devices.rank(), devices.world()) == (0, 1)
    assert devices.any_of_all(1.5) is True
    assert devices.any_of_all(None) is False
    x = torch.tensor([1.0, 3.0])
    assert devices.mean_of_all(x).tolist() == [1.0, 3.0]


def test_alone_the_loss_is_the_methods_own_and_exchanges_nothing():
    method = nn.Linear(1, 1)
    method.loss = torch.sub
    loss = devices.shared_loss(method)
    assert loss(torch.tensor(3.0), torch.tensor(1.0)) == 2
    with devices.exchange(loss, False):
        pass
