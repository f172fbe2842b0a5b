"""A device that is played: an accelerator's rules about where data lies, without one.

    with PlayedDevice() as device:
        method.to(DEVICE).loss(images.to(DEVICE)).backward()
    device.reads, device.copies                 # where the host read, where it copied

A tensor of the device, `OnDevice`, says `.device == DEVICE` and keeps its numbers in a CPU
tensor, `held`. PyTorch shows every operation to `PlayedDevice` between autograd and the kernel
(`__torch_dispatch__`), which runs it on the held tensors and puts the result on the device.
Losses, gradients and samples are real numbers, and it is seen where
- an operation mixes devices: RuntimeError. Arithmetic takes a CPU tensor without dimensions, as
  on hardware, where it travels with the kernel's arguments;
- the host waits for numbers of the device (`.item()`, `.cpu()`, indexing by a mask): a read;
- numbers go from the host to the device (`.to`, `torch.tensor(..., device=)`): a copy.

DEVICE is called "meta" because only a build with CUDA lets a tensor say "cuda". Functions that
work below the operations shown (`tolist`, `torch.tensor` and its like) are written as such
operations by `InOperations`. Not played: streams, generators, precision, memory.
"""
import contextlib
import linecache
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ROOT = str(Path(__file__).parent.parent)


class OnDevice(torch.Tensor):
    """A tensor of the played device, with its numbers in the CPU tensor `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the played device, outside of `with PlayedDevice()`")


class PlayedDevice(TorchDispatchMode):
    """The device's rules; `reads` and `copies` are lists of `place`."""

    def __init__(self):
        super().__init__()
        self.reads = []
        self.copies = []
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        # Precision is not played, and torch.autocast refuses the name "meta"
        self.patches.enter_context(mock.patch.object(torch, "autocast", no_autocast))
        self.patches.enter_context(InOperations())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def forget(self):
        self.reads.clear()
        self.copies.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        tensors = tensors_in((*args, *kwargs.values()))
        from_device = any(is_on_device(tensor) for tensor in tensors)
        if not from_device and target != DEVICE:
            return func(*args, **kwargs)
        if is_read(func, args, target):
            self.reads.append(place(func))
        else:
            self.check_tensors_of_the_cpu(func, args, tensors, from_device)
        if target == DEVICE:
            kwargs["device"] = torch.device("cpu")
        kwargs = {name: held_by(value) for name, value in kwargs.items()}
        out = func(*held_by(args), **kwargs)
        if func._schema.is_mutable:
            return None if out is None else args[0]
        return put_on_device(out) if target in (None, DEVICE) else out

    def check_tensors_of_the_cpu(self, func, args, tensors, from_device):
        """Those that an operation copies to the device are counted, others refused."""
        for tensor in tensors:
            if is_on_device(tensor):
                continue
            if is_copied(func, args, tensor):
                self.copies.append(place(func))
                continue
            travels = tensor.ndim == 0 and torch.Tag.pointwise in func.tags
            if from_device and not travels:
                raise RuntimeError(f"a CPU tensor meets the device's at {place(func)}")


def is_read(func, args, target):
    """Whether the host waits for numbers of the device."""
    name = func._schema.name
    if name == "aten::copy_":
        return not is_on_device(args[0])
    if name == "aten::_to_copy":
        return target not in (None, DEVICE)
    if name == "aten::multinomial":  # looks at the probabilities first, but in this one case
        return not (args[1] > 1 and args[2:3] == (True,))
    if name in INDEXING:
        return any(index.dtype == torch.bool for index in tensors_in(args[1]))
    return name == "aten::equal" or any(tag in READING for tag in func.tags)


def is_copied(func, args, tensor):
    """Whether the operation itself copies this CPU tensor to the device."""
    name = func._schema.name
    if name in INDEXING:
        return is_on_device(args[0]) and any(tensor is index for index in args[1])
    if name == "aten::where":
        return tensor.ndim == 0
    return name in ("aten::copy_", "aten::_to_copy")


def place(func):
    """file:line in this repository, the code there, and the operation."""
    for frame, line in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "site-packages" not in path and path != __file__:
            code = linecache.getline(path, line).strip()
            return f"{Path(path).name}:{line}  {code}  ({func})"
    return f"?  ({func})"


class InOperations(TorchFunctionMode):
    """Functions that work below the operations that are shown, written in such operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor:
            like, *args = args
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
            func = torch.tensor
        if func in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def tensors_in(values):
    """The tensors among values, and in the lists among them: the arguments of an operation."""
    tensors = []
    for value in values:
        if torch.is_tensor(value):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += tensors_in(value)
    return tensors


def held_by(x):
    """The CPU tensors of a tensor of the device, or of a list that has some."""
    if isinstance(x, (list, tuple)):
        return type(x)(held_by(value) for value in x)
    return x.held if is_on_device(x) else x


def put_on_device(x):
    """What an operation returned, a tensor or several, as tensors of the device."""
    if isinstance(x, (list, tuple)):
        return type(x)(put_on_device(value) for value in x)
    return OnDevice(x) if torch.is_tensor(x) else x


def is_on_device(x):
    return isinstance(x, OnDevice)


def no_autocast(*_, **__):
    return contextlib.nullcontext()
