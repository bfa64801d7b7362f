"""From a behaviour to the parts of the model that cause it."""

from interp_jax.attribution.activation_patching import Patching, activation_patching, joint_patching
from interp_jax.attribution.activations_at import activations_at
from interp_jax.attribution.atp import atp, integrated_gradients
from interp_jax.attribution.atp_star import atp_star
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
from interp_jax.attribution.metric import KL, LogitDifference, LogProbability, Loss
from interp_jax.attribution.nodes import Effects, Node, NodeEffect, Nodes
from interp_jax.attribution.non_linear_excess import Excess, LinearStructure, linear_structure, non_linear_excess
from interp_jax.attribution.path_patching import path_patching
from interp_jax.attribution.probes import Probes, train_probes
from interp_jax.attribution.prompt_pair import PromptPair, prompt_pair
from interp_jax.attribution.truncated_context import TruncatedContext, truncated_context_similarity
from interp_jax.attribution.verification import (
    Search,
    SubsetBound,
    Verification,
    by_score,
    hierarchical,
    in_blocks,
    iterative,
    recall_curve,
    subsampling,
    subset_bound,
    verify,
)
from interp_jax.attribution.virtual_weights import StrongestWeights, strongest_virtual_weights, virtual_weights

__all__ = [
    "KL",
    "DirectAttribution",
    "Effects",
    "Excess",
    "Knockout",
    "LatentCircuit",
    "LatentEdges",
    "LinearStructure",
    "LogProbability",
    "LogitDifference",
    "LogitLens",
    "Loss",
    "LowRank",
    "Node",
    "NodeEffect",
    "Nodes",
    "Patching",
    "Probes",
    "PromptPair",
    "Search",
    "StrongestWeights",
    "SubsetBound",
    "TruncatedContext",
    "Verification",
    "activation_patching",
    "activations_at",
    "atp",
    "atp_star",
    "attention_knockout",
    "attention_patterns",
    "by_score",
    "composition_score",
    "direct_latent_attribution",
    "direct_logit_attribution",
    "hierarchical",
    "in_blocks",
    "integrated_gradients",
    "iterative",
    "joint_patching",
    "knocked_out",
    "latent_circuit",
    "latent_edges",
    "latent_nodes",
    "linear_structure",
    "logit_lens",
    "non_linear_excess",
    "output_value_circuit",
    "path_patching",
    "prompt_pair",
    "query_key_circuit",
    "recall_curve",
    "strongest_virtual_weights",
    "subsampling",
    "subset_bound",
    "train_probes",
    "truncated_context_similarity",
    "verify",
    "virtual_weights",
    "with_latents",
]
