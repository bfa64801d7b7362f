"""What gemma's models run (`nn.Identity`), and what modules that they import take as base classes and annotations."""

import types
from typing import Any

import flax.linen

from kauldron import typing


class Identity(flax.linen.Module):
    """A module so that its name can be intercepted; it gives back its input."""

    def __call__(self, x: Any) -> Any:
        return x


class _AbstractPartialLoader:
    """The base of gemma's readers of checkpoints, in the framework's own way of training."""


def _with_sharding_constraint(values: Any, sharding: Any) -> Any:
    if sharding is not None:
        raise NotImplementedError("The stand-in for kauldron shards nothing.")
    return values


nn = types.SimpleNamespace(Identity=Identity)
sharding = types.SimpleNamespace(ShardingTree=Any, with_sharding_constraint=_with_sharding_constraint)
ckpts = types.SimpleNamespace(AbstractPartialLoader=_AbstractPartialLoader)
train = types.SimpleNamespace(TrainState=Any)
__all__ = ["ckpts", "nn", "sharding", "train", "typing"]
