"""From a behaviour to the parts of the model that cause it."""

from interp_jax.attribution.activations_at import activations_at
from interp_jax.attribution.attention_knockout import Knockout, attention_knockout, attention_patterns, knocked_out
from interp_jax.attribution.direct_logit_attribution import (
    DirectAttribution,
    direct_latent_attribution,
    direct_logit_attribution,
)
from interp_jax.attribution.head_circuits import LowRank, composition_score, output_value_circuit, query_key_circuit
from interp_jax.attribution.latent_circuit import LatentCircuit, latent_circuit
from interp_jax.attribution.latent_edges import LatentEdges, latent_edges
from interp_jax.attribution.latent_nodes import latent_nodes, with_latents
from interp_jax.attribution.logit_lens import LogitLens, logit_lens
from interp_jax.attribution.non_linear_excess import Excess, LinearStructure, linear_structure, non_linear_excess
from interp_jax.attribution.probes import Probes, train_probes
from interp_jax.attribution.truncated_context import TruncatedContext, truncated_context_similarity
from interp_jax.attribution.virtual_weights import StrongestWeights, strongest_virtual_weights, virtual_weights

__all__ = [
    "DirectAttribution",
    "Excess",
    "Knockout",
    "LatentCircuit",
    "LatentEdges",
    "LinearStructure",
    "LogitLens",
    "LowRank",
    "Probes",
    "StrongestWeights",
    "TruncatedContext",
    "activations_at",
    "attention_knockout",
    "attention_patterns",
    "composition_score",
    "direct_latent_attribution",
    "direct_logit_attribution",
    "knocked_out",
    "latent_circuit",
    "latent_edges",
    "latent_nodes",
    "linear_structure",
    "logit_lens",
    "non_linear_excess",
    "output_value_circuit",
    "query_key_circuit",
    "strongest_virtual_weights",
    "train_probes",
    "truncated_context_similarity",
    "virtual_weights",
    "with_latents",
]
