"""Where a PyTorch peer works: on the GPU where there is one, as JAX does, else on all cores.

On a GPU both libraries multiply f32 matrices in TF32: JAX by default, PyTorch because it is told to here.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

__all__ = ["exactly", "peer_device", "wait_for"]


def peer_device(torch: Any) -> str:
    """The device's name for PyTorch, which is set up for it.

    Args:
        torch: the module.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # of Linux; fewer cores than the machine's, under `taskset`
    torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
    if not torch.cuda.is_available():
        return "cpu"
    torch.set_float32_matmul_precision("high")
    return "cuda"


def wait_for(torch: Any) -> None:
    """Returns when all that was asked of the device is done.

    Args:
        torch: the module.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def exactly(torch: Any) -> Iterator[None]:
    """Products in full f32: for what is compared with another library's numbers.

    Args:
        torch: the module.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
