"""What pytest has to know; what the tests share stands in helpers.py and explain.py."""
import os
from pathlib import Path

import pytest
import torch
from explain import close, current_test
from helpers import Gaussian, closed_form, last, linear_alpha_bar, tensor

__all__ = ["HERE", "Gaussian", "close", "closed_form", "last", "linear_alpha_bar", "tensor"]

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tests' tensors are small


@pytest.fixture(autouse=True)
def seed():
    """SEED=7 python -m pytest: other random numbers, the same facts."""
    number = int(os.environ.get("SEED", "0"))
    torch.default_generator.manual_seed(number)  # the one that tests draw from


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """A file is synced to outlive a power failure, which no test plays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def known_to_explain(request):
    """A comparison that fails reads the test's name and marks."""
    token = current_test.set(request.node)
    yield
    current_test.reset(token)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """In an assignment, a test that meets another paper's blank function waits for it."""
    try:
        return (yield)
    except NotImplementedError as error:
        blank = last_file(error)
        elsewhere = item.path.stem != f"test_{blank.stem}"
        if blank.parent == HERE.parent and elsewhere:
            pytest.skip(f"waits for {blank.name}: {error}")
        raise


pytest_runtest_setup = pytest_runtest_call  # a fixture may train a run


def last_file(error):
    """The file in which an exception was raised."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename)
