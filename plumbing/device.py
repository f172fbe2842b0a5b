"""Where the work is done: the device, its precision, random numbers, and several processes."""
import atexit
import contextlib
import datetime
import importlib.util
import os
import sys

import numpy as np
import torch
from torch import nn

from .flags import UserError


def pick(name=None):
    """torch.device: the one named, or the first of cuda, mps and cpu that is there.

    Of several processes each gets a GPU of its own. UserError for a device that is not here.
    """
    name = name or first_there()
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"no device {name}: choose cuda, mps or cpu")
    if name.startswith("cuda:") and world() > 1:
        raise UserError(f"{name} is one GPU for {world()} processes: give --device cuda")
    if name == "cuda" and world() > 1:
        name = f"cuda:{local_rank()}"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"no device {name} here: {first_line}") from None
    return torch.device(name)


def local_rank():
    """This process's number on its machine; every one there says so where GPUs are too few."""
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if gpus < processes:
        raise UserError(f"{processes} processes for {gpus} GPUs: lower --nproc_per_node")
    return int(os.environ["LOCAL_RANK"])


def first_there():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def precision_on(device, precision):
    """fp32 or bf16; auto is bf16 on GPUs and CPUs that have it: experiments/choices.md."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device):
    """Whether the device multiplies in bf16; elsewhere that is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer torch
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return False


def autocast(device, precision):
    """The context in which networks run in fp32 or bf16; see precision_on."""
    in_bf16 = precision_on(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16)


def to_device(method, device):
    """Move a method. channels_last: sampling 1.2 to 1.5, training 1.0 to 1.1 times as fast."""
    if device.type == "mps":  # it has no float64; the schedule loses digits there
        return method.float().to(device)
    return method.to(device, memory_format=torch.channels_last)


def images_fit(images, device):
    """Whether the images lie on the device; one decision for all processes."""
    fit = True
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fit = images.nbytes < free / 2
    return not any_of_all(not fit)


def compiles(asked, device, steps):
    """Whether to compile; unasked on CUDA with Triton, in runs that are long beside it."""
    if asked is not None:
        return asked
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and steps >= 20_000 and has_triton


# Random numbers

def seed_of(*key):
    """A seed that depends on the key alone; keys of one kind have one length."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seeded_noise(keys):
    """A randn_like whose image k depends on keys[k] alone, not on the batch or the device."""
    generators = [torch.Generator().manual_seed(seed_of(*key)) for key in keys]

    def randn_like(x):
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)

    return randn_like


# Several processes, started by torchrun

def join():
    """Join the processes that torchrun started, if it did; only the first one reports."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    atexit.register(torch.distributed.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def joined():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank():
    """The number of this process, 0 for the first."""
    return torch.distributed.get_rank() if joined() else 0


def world():
    """How many processes there are."""
    return torch.distributed.get_world_size() if joined() else 1


def any_of_all(flag):
    """Whether `flag` is true in this process or in any other."""
    if world() == 1:
        return bool(flag)
    raised = torch.tensor(float(bool(flag)))
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return bool(raised)


def mean_of_all(x):
    """A tensor's mean over the processes, on the CPU."""
    x = x.detach().to("cpu", copy=True)
    if world() > 1:
        torch.distributed.all_reduce(x)
    return x / world()


class Loss(nn.Module):
    """method.loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, *arguments):
        return self.method.loss(*arguments)


def shared_loss(method, some_unused=False):
    """method.loss; of several processes, with the mean of their gradients.

    some_unused: a step may leave weights without a gradient, as those of a split chain.
    Buffers are not copied from the first process: the methods keep them equal themselves.
    """
    if world() == 1:
        return method.loss
    return nn.parallel.DistributedDataParallel(
        Loss(method), broadcast_buffers=False, find_unused_parameters=some_unused
    )


def exchange(loss, wanted):
    """The context of a backward pass after which processes exchange gradients, if wanted."""
    return contextlib.nullcontext() if wanted or world() == 1 else loss.no_sync()
