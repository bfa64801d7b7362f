"""Sparse codes of signals in a fixed dictionary, found without an encoder: pursuits, and the encoder made of one."""

from interp_jax.pursuit.gradient_pursuit import gradient_pursuit as gradient_pursuit
from interp_jax.pursuit.matching_pursuit import matching_pursuit as matching_pursuit
from interp_jax.pursuit.orthogonal_matching_pursuit import kkt_violation as kkt_violation
from interp_jax.pursuit.orthogonal_matching_pursuit import nonnegative_omp as nonnegative_omp
from interp_jax.pursuit.orthogonal_matching_pursuit import orthogonal_matching_pursuit as orthogonal_matching_pursuit
from interp_jax.pursuit.pursuit_encoder import PursuitEncoder as PursuitEncoder
from interp_jax.pursuit.sparse_code import SparseCode as SparseCode
from interp_jax.pursuit.sparse_coder import SparseCoder as SparseCoder
from interp_jax.pursuit.topk_encode import TopKEncoder as TopKEncoder
from interp_jax.pursuit.topk_encode import topk_encode as topk_encode
