"""One computation in two ways: on a GPU few large kernels, where a loop waits for each of its small ones.

What is made in parts that fit a CPU's cache, or searched for in a loop, is made at once there. Which it is is decided
where the program is compiled for a device, so that a program for another one can be compiled anywhere.
"""

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["gpu_or_default"]


def gpu_or_default(*args: Any, gpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`gpu(*args)` on a GPU, `default(*args)` elsewhere; both give the same, but for rounding.

    Args:
        *args: arrays.
        gpu: for NVIDIA's and AMD's.
        default: for CPUs and TPUs.
    """
    return jax.lax.platform_dependent(*args, cuda=gpu, rocm=gpu, default=default)
