"""Stands in for kauldron, a training framework that brings TensorFlow: the few names of it that gemma's models use."""

from kauldron import kd, kontext

__all__ = ["kd", "kontext"]
