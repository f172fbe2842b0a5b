"""What the papers' files ask of an accelerator, on a device that is played (played_device.py).

A read makes the host wait until the device has done all that it was given; a copy from
pageable memory does so too. A step that has neither can be queued while the last one runs.
"""
from functools import partial

import pytest
import torch
from played_device import DEVICE, OnDevice, PlayedDevice
from torch import nn

import patch_diffusion
from ddpm import DDPM
from edm import EDM, augment, denoiser, ode_invert, ode_sample
from iddpm import IDDPM
from patch_diffusion import PatchDiffusion
from pdm import PDM, posterior_mean
from unet import Guided, UNet

CHAINS = {
    "DDPM": (DDPM, {}),
    "DDPM, small variance": (DDPM, {"variance": "small", "clip": False}),
    "DDPM, bound": (DDPM, {"objective": "bound"}),
    "IDDPM, simple": (IDDPM, {"objective": "simple"}),
    "IDDPM, hybrid": (IDDPM, {"objective": "hybrid"}),
    "IDDPM, hybrid, linear": (IDDPM, {"objective": "hybrid", "schedule": "linear"}),
    "IDDPM, vlb": (IDDPM, {"objective": "vlb", "importance": False}),
    "IDDPM, vlb, importance": (IDDPM, {"objective": "vlb"}),
    "PDM": (PDM, {}),
    "PDM, eps": (PDM, {"predict": "eps", "weight": "snr"}),
    "PDM, v": (PDM, {"predict": "v", "weight": "snr+1"}),
    "PDM, P = 1": (PDM, {"patch": (1,)}),
    "PDM, learned variance": (PDM, {"learn_variance": True}),
    "PDM, linear": (PDM, {"schedule": "linear0.025"}),
}
LEVELS = {
    "EDM": (EDM, {}),
    "EDM, vp": (EDM, {"precond": "vp"}),
    "EDM, ve": (EDM, {"precond": "ve"}),
    "EDM, iddpm": (EDM, {"precond": "iddpm"}),
    "EDM, vp's noise, ve's weight": (EDM, {"p_train": "vp", "weight": "ve"}),
    "EDM, iddpm's noise": (EDM, {"p_train": "iddpm"}),
    "EDM, augmented": (EDM, {"augment": 0.5}),
    "Patch Diffusion": (PatchDiffusion, {}),
    "Patch Diffusion, progressive": (PatchDiffusion, {"sizes": "progressive"}),
    "Patch Diffusion, halves": (PatchDiffusion, {"p_full": 0.0, "quarter": False}),
}
SAMPLERS = CHAINS | LEVELS
WEIGHTS = {
    "PDM, weight 1": (PDM, {"weight": "1"}),
    "PDM, truncated": (PDM, {"weight": "truncated"}),
    "PDM, p2": (PDM, {"weight": "p2"}),
}
VARIANTS = SAMPLERS | WEIGHTS

OF_CHAINS = {
    "ancestral": {},
    "DDIM": {"eta": 0.0},
    "DDIM with noise": {"eta": 0.5},
}
OF_LEVELS = {
    "Algorithm 2": {},
    "Algorithm 2 with churn": {"S_churn": 2.0, "S_noise": 1.007},
}
OF_CROPS = {"window": {"corner": (2, 4), "image": (16, 16)}}
OF_ALL = {
    "Heun": {},
    "Heun with churn": {"S_churn": 2.0},
    "Euler": {"solver": "euler"},
    "midpoint": {"alpha": 0.5},
    "VP": {"schedule": "vp", "scaling": "vp"},
    "VE": {"schedule": "ve"},
}


@pytest.fixture
def device():
    patch_diffusion.grid_on.cache_clear()
    with PlayedDevice() as device:
        patch_diffusion.grid_on(8, 8, DEVICE)  # kept from the first step on
        device.forget()
        yield device
    patch_diffusion.grid_on.cache_clear()


def u_net(in_channels, out_channels):
    return UNet(in_channels, out_channels, width=8, mults=(1,), attention=(0,), classes=3)


class Layer(nn.Module):
    """A network of one layer, told the noise and the class: quick, where the sampler counts."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, out_channels, 1)
        self.label = nn.Embedding(4, 1)  # row 0: no class

    def forward(self, x, c_noise, y=None):
        told = c_noise[:, None] + self.label(y + 1)
        return self.layer(x) + torch.tanh(told)[:, :, None, None]


def on_device(name, make_net=Layer):
    method, options = VARIANTS[name]
    chain = {} if name in LEVELS else {"T": 40}
    return method(make_net, 1, **chain, **options).to(DEVICE)


def images():
    return torch.rand(4, 1, 8, 8, device=DEVICE) * 2 - 1


def labels():
    return torch.arange(-1, 3, device=DEVICE)  # the first is hidden


class Training:
    """As train.py: loss, gradients, Adam, moving average."""

    def __init__(self, method):
        self.method = method
        self.optimizer = torch.optim.Adam(method.parameters())
        self.average = [parameter.detach().clone() for parameter in method.parameters()]

    def step(self, x, y):
        loss = self.method.loss(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, parameter in zip(self.average, self.method.parameters()):
            average.lerp_(parameter.detach(), 0.01)
        return loss.detach()


def run(sampler, steps=3, **options):
    """Yields after each step of a sampler, whose images lie on the device."""
    for x, x_0_hat in sampler(images(), labels(), steps=steps, **options):
        assert x.device == x_0_hat.device == DEVICE
        assert x.dtype == x_0_hat.dtype == torch.float32
        yield


def assert_steps_are_free(device, sampler, samplers):
    """What the steps after the first, which comes with the set-up, read and copy: nothing."""
    for name, options in samplers.items():
        steps = run(sampler, **options)
        next(steps)
        device.forget()
        for _ in steps:
            pass
        assert device.reads == [], name
        assert device.copies == [], name


# Training

@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_makes_the_host_neither_read_nor_copy(name, device):
    training = Training(on_device(name))
    x = images()
    y = labels()
    device.forget()
    training.step(x, y)
    assert device.reads == []
    assert device.copies == []


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["DDPM", "PDM", "EDM, augmented", "Patch Diffusion"])
def test_a_training_step_of_the_u_net_makes_it_neither_read_nor_copy(name, labelled, device):
    training = Training(on_device(name, u_net))
    x = images()
    y = labels() if labelled else None
    training.step(x, y)
    device.forget()
    training.step(x, y)
    assert device.reads + device.copies == []


def test_the_coordinates_of_an_image_size_are_copied_once(device):
    method = on_device("Patch Diffusion")
    x = torch.rand(4, 1, 8, 16, device=DEVICE)
    device.forget()
    for s in (8, 4, 2):
        method.loss(x, labels(), s).backward()
    assert device.reads == []
    assert len(device.copies) == 1


# Which network serves which image decides how much each has to do: the host must know it
def test_split_networks_read_which_images_are_theirs_and_nothing_else(device):
    method = PDM(u_net, 1, T=40, patch=(2, 1), split_snr=(1.0,)).to(DEVICE)
    training = Training(method)
    device.forget()
    training.step(images(), labels())
    steps = run(method.sample)
    next(steps)
    of_the_set_up = [read for read in device.reads if "Chain(" in read]
    assert len(of_the_set_up) == 1
    device.reads.remove(*of_the_set_up)
    for _ in steps:
        pass
    assert device.reads
    assert [read for read in device.reads if "nonzero()" not in read] == []
    assert device.copies == []


# Sampling

@pytest.mark.parametrize("name", CHAINS)
def test_the_steps_of_a_chain_neither_read_nor_copy(name, device):
    assert_steps_are_free(device, on_device(name).sample, OF_CHAINS)


@pytest.mark.parametrize("name", LEVELS)
def test_the_steps_of_algorithm_2_neither_read_nor_copy(name, device):
    crops = OF_CROPS if name.startswith("Patch") else {}
    assert_steps_are_free(device, on_device(name).sample, OF_LEVELS | crops)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_steps_of_the_general_solver_neither_read_nor_copy_on_any_method(name, device):
    D = denoiser(on_device(name))
    assert_steps_are_free(device, partial(ode_sample, D), OF_ALL)


@pytest.mark.parametrize("name", ["DDPM", "IDDPM, hybrid", "EDM, iddpm", "Patch Diffusion"])
def test_what_the_set_up_of_a_sampler_reads_and_copies_does_not_grow_with_the_steps(
    name, device
):
    method = on_device(name)
    D = denoiser(method)
    for sampler in (method.sample, partial(ode_sample, D)):
        traffic = {}
        for steps in (3, 6):
            device.forget()
            for _ in run(sampler, steps=steps):
                pass
            traffic[steps] = device.reads + device.copies
        assert traffic[3] == traffic[6]
        assert len(traffic[6]) <= 1


@pytest.mark.parametrize("name", ["DDPM", "IDDPM, hybrid", "PDM", "EDM", "Patch Diffusion"])
def test_the_steps_of_guided_samplers_neither_read_nor_copy(name, device):
    method = on_device(name, u_net)
    method.net = Guided(method.net, 1.5)
    assert_steps_are_free(device, method.sample, {"guided": {}})


# The rest: nothing mixes devices; what is read and copied is no step's

@pytest.mark.parametrize("name", SAMPLERS)
def test_the_latents_of_inversion_lie_where_the_images_do(name, device):
    x = images()
    D = denoiser(on_device(name))
    device.forget()
    latent = ode_invert(D, x, labels(), steps=3)
    assert latent.device == DEVICE
    assert [read for read in device.reads if "edm.py" in read] == []


@pytest.mark.parametrize("name", CHAINS)
def test_the_variational_bound_lies_where_the_images_do(name, device):
    bound = on_device(name).bits_per_dim(images(), labels(), steps=4)
    assert {value.device for value in bound.values()} == {DEVICE}


def test_augmented_images_and_their_labels_lie_where_the_images_do(device):
    warped, warps = augment(images(), 0.5)
    assert warped.device == warps.device == DEVICE


@pytest.mark.parametrize("alpha_bar", [0.5, torch.full((4, 1, 1, 1), 0.5)], ids=["one", "each"])
def test_the_posterior_mean_lies_where_the_noisy_images_do(alpha_bar, device):
    x_t = images()
    for data in (images(), torch.rand(6, 1, 8, 8)):
        assert posterior_mean(x_t, alpha_bar, data).device == DEVICE


# The device itself

def test_the_device_computes_what_the_cpu_does(device):
    method = EDM(u_net, 1, augment=0.5)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    torch.manual_seed(1)
    expected = method.loss(x)
    expected.backward()
    gradients = [parameter.grad for parameter in method.parameters()]
    method.zero_grad()
    method.to(DEVICE)
    torch.manual_seed(1)
    loss = method.loss(x.to(DEVICE))
    loss.backward()
    assert torch.equal(loss.held, expected.detach())
    for parameter, gradient in zip(method.parameters(), gradients):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert torch.equal(parameter.grad.held, gradient)


MIXED = {
    "sum": lambda there, here: there + here,
    "where": lambda there, here: torch.where(there > 0, there, here),
    "matrix product": lambda there, here: there @ here,
    "concatenation": lambda there, here: torch.cat([here, there]),
    "stack of numbers": lambda there, here: torch.stack([here[0, 0], there[0, 0]]),
    "in place": lambda there, here: here.mul_(there),
    "index": lambda there, here: here[there.long()],
    "layer": lambda there, here: nn.Linear(3, 3)(there),
    "loss": lambda there, here: nn.functional.mse_loss(there, here),
}


@pytest.mark.parametrize("name", MIXED)
def test_an_operation_that_mixes_devices_raises(name, device):
    here = torch.ones(3, 3)
    there = here.to(DEVICE)
    with pytest.raises(RuntimeError, match="test_device_placement.py"):
        MIXED[name](there, here)


def test_a_cpu_number_takes_part_in_arithmetic(device):
    there = torch.ones(3, device=DEVICE)
    assert ((there + torch.tensor(2.0)) / torch.tensor(3.0)).held.tolist() == [1, 1, 1]
    assert device.reads + device.copies == []


READS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x[0]),
    "index by a number": lambda x: x[x.long()[0]],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "one draw": lambda x: x.multinomial(1),
}


@pytest.mark.parametrize("name", READS)
def test_what_makes_the_host_wait_is_a_read(name, device):
    x = torch.ones(3).to(DEVICE)
    device.forget()
    READS[name](x)
    assert len(device.reads) >= 1
    assert device.reads[0].startswith("test_device_placement.py")
    assert device.copies == []


COPIES = {
    "to": lambda x: torch.ones(3).to(DEVICE),
    "to, of a module": lambda x: nn.Linear(3, 3, bias=False).to(DEVICE),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=DEVICE),
    "as_tensor": lambda x: torch.as_tensor(1.0, device=DEVICE),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "index from the host": lambda x: x[torch.arange(2)],
    "number of the host in where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_sends_numbers_to_the_device_is_a_copy(name, device):
    x = torch.ones(3, device=DEVICE)
    device.forget()
    COPIES[name](x)
    assert len(device.copies) == 1
    assert device.copies[0].startswith("test_device_placement.py")
    assert device.reads == []


def test_what_is_made_on_the_device_is_no_copy(device):
    x = torch.zeros(3, device=DEVICE) + torch.randn(3, device=DEVICE)
    x = torch.where(x > 0, 1.0, x) + torch.full_like(x, 2.0) + x.new_zeros(3)
    x = x + torch.zeros_like(torch.ones(3), device=DEVICE)
    x = x.to(torch.float64).to(DEVICE) + torch.as_tensor(x, device=DEVICE)
    x[0] = 1.0
    assert isinstance(x[:2].multinomial(3, replacement=True), OnDevice)
    assert device.reads + device.copies == []


def test_outside_of_its_context_the_device_does_nothing_and_torch_is_as_before():
    autocast = torch.autocast
    with PlayedDevice():
        x = torch.ones(3, device=DEVICE)
    assert torch.autocast is autocast
    assert torch.ones(3, device=DEVICE).is_meta
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
