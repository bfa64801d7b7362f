"""Sparse autoencoders: arrays in, a dictionary out. Nothing here knows a language model."""

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_topk import BatchTopKSAE
from interp_jax.sae.dictionary_structure import DictionaryStructure, dictionary_structure
from interp_jax.sae.evaluate import Evaluation, evaluate, loss_recovered
from interp_jax.sae.frequency_histogram import FrequencyHistogram, frequency_histogram
from interp_jax.sae.gated import GatedSAE
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.matryoshka import MatryoshkaSAE
from interp_jax.sae.mean_max_cosine import max_cosines, mean_max_cosine
from interp_jax.sae.protocol import Autoencoder
from interp_jax.sae.relu import ReLUSAE
from interp_jax.sae.saelens import load_saelens, save_saelens
from interp_jax.sae.sharing import load_sae, save_sae
from interp_jax.sae.sweep import SweepRun, sweep
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.train import NonFiniteLossError, train
from interp_jax.sae.train_config import TrainConfig

__all__ = [
    "Autoencoder",
    "BatchTopKSAE",
    "DictionaryStructure",
    "Evaluation",
    "FrequencyHistogram",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "NonFiniteLossError",
    "ReLUSAE",
    "SparseAutoencoder",
    "SweepRun",
    "TopKSAE",
    "TrainConfig",
    "dictionary_structure",
    "evaluate",
    "frequency_histogram",
    "load_sae",
    "load_saelens",
    "loss_recovered",
    "max_cosines",
    "mean_max_cosine",
    "save_sae",
    "save_saelens",
    "sweep",
    "train",
]
