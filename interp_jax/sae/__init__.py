"""Sparse autoencoders: arrays in, a dictionary out. Nothing here knows a language model."""

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_topk import BatchTopKSAE
from interp_jax.sae.evaluate import Evaluation, evaluate, loss_recovered, mean_max_cosine
from interp_jax.sae.gated import GatedSAE
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.matryoshka import MatryoshkaSAE
from interp_jax.sae.relu import ReLUSAE
from interp_jax.sae.saelens import load_saelens, save_saelens
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.train import NonFiniteLossError, train
from interp_jax.sae.train_config import TrainConfig

__all__ = [
    "BatchTopKSAE",
    "Evaluation",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "NonFiniteLossError",
    "ReLUSAE",
    "SparseAutoencoder",
    "TopKSAE",
    "TrainConfig",
    "evaluate",
    "load_saelens",
    "loss_recovered",
    "mean_max_cosine",
    "save_saelens",
    "train",
]
