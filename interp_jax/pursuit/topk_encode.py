"""The k largest codes of an encoder: what an SAE gives at another sparsity than its own, beside pursuit at the same."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interp_jax.pursuit.norms import norm
from interp_jax.pursuit.sparse_code import PRECISE, SparseCode, code_of
from interp_jax.pursuit.sparse_coder import SparseCoder

__all__ = ["TopKEncoder", "topk_encode"]


def topk_encode(sae: Any, signals: Float[Array, "*batch d_in"], l0: int) -> SparseCode:
    """An encoder's codes, all but the `l0` largest of a signal set to zero.

    Args:
        sae: an autoencoder, not a transcoder.
        signals: activations as they come; the decoder bias is the autoencoder's own affair.
        l0: the most latents a signal may use.

    Returns:
        The codes. `residual_norm` is that of `signal - decode - b_dec`.

    Raises:
        ValueError: if `l0` is not within 1..d_sae.
    """
    dictionary = sae.W_dec[...]
    if not 1 <= l0 <= dictionary.shape[0]:
        raise ValueError(f"l0 is {l0}; expected 1 to {dictionary.shape[0]}, the number of latents.")
    flat = signals.reshape(-1, signals.shape[-1])
    weights, indices = jax.lax.top_k(sae.encode(flat), l0)
    residual = flat - sae.b_dec[...] - jnp.einsum("bk,bkd->bd", weights, dictionary[indices], precision=PRECISE)
    code = code_of(indices, weights, norm(residual))
    return SparseCode(*(value.reshape(*signals.shape[:-1], *value.shape[1:]) for value in code))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sae"], meta_fields=["l0"])
@dataclasses.dataclass(frozen=True)
class TopKEncoder(SparseCoder):
    """An autoencoder of whose codes only the largest are kept."""

    def code(self, x: Float[Array, "*batch d_in"]) -> SparseCode:
        """The largest of the encoder's codes.

        Args:
            x: activations.
        """
        self.check()
        return topk_encode(self.sae, x, self.l0)
