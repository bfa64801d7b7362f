"""Several processes that train together: how they find each other, and which of them does what one has to do.

All are started with the same command. JAX joins them (`jax.distributed`); after that a mesh over `jax.devices()` is one
over the devices of all.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

__all__ = ["ALONE", "Processes", "first_before_others", "is_first_process"]

T = TypeVar("T")

_PATIENCE = 7 * 24 * 3600
"""Seconds to wait for the first process: it may have a long piece of work to do."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find each other."""

    distributed: bool = False
    """Train with several processes, each started with this command; SLURM, MPI, Kubernetes and Cloud TPUs are known."""
    coordinator: str | None = None
    """With --distributed, elsewhere than on those: HOST:PORT of the first process."""
    n_processes: int | None = None
    """With --distributed, elsewhere than on those: how many there are."""
    process_id: int | None = None
    """With --distributed, elsewhere than on those: which of them this is, from 0."""

    def join(self) -> None:
        """Joins the others, if there are any; to be called before anything is computed.

        Raises:
            ValueError: if only some of what tells the processes is given, or it is given without `distributed`.
        """
        told = (self.coordinator, self.n_processes, self.process_id)
        if not self.distributed:
            if any(one is not None for one in told):
                raise ValueError("coordinator, n_processes and process_id are of use with --distributed alone.")
            return
        if any(one is not None for one in told) and any(one is None for one in told):
            raise ValueError("coordinator, n_processes and process_id go together: give all three, or none.")
        try:
            jax.distributed.initialize(self.coordinator, self.n_processes, self.process_id)
        except ValueError as error:
            raise ValueError(
                f"JAX cannot tell which processes there are ({error}). Give --coordinator HOST:PORT, --n-processes and "
                "--process-id."
            ) from None


ALONE = Processes()
"""One process."""


def is_first_process() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def first_before_others(make: Callable[[], T]) -> T:
    """Lets the first process do something alone, and then the others, which find what it has made.

    Args:
        make: what is to be done.

    Returns:
        What it returned in this process.
    """
    everyone = set(range(jax.process_count()))
    if is_first_process():
        made = make()
        ocp.multihost.sync_global_processes("the first is done", timeout=_PATIENCE, processes=everyone)
        return made
    ocp.multihost.sync_global_processes("the first is done", timeout=_PATIENCE, processes=everyone)
    return make()
