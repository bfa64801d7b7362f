"""Sparse autoencoders: arrays in, a dictionary out. Nothing here knows a language model."""

from interp_jax.sae.evaluate import Evaluation, evaluate, loss_recovered, mean_max_cosine
from interp_jax.sae.saelens import load_saelens, save_saelens
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.train import NonFiniteLossError, TrainConfig, train

__all__ = [
    "Evaluation",
    "NonFiniteLossError",
    "TopKSAE",
    "TrainConfig",
    "evaluate",
    "load_saelens",
    "loss_recovered",
    "mean_max_cosine",
    "save_saelens",
    "train",
]
