"""The same function as another kind of autoencoder, for tools that have fewer kinds.

All of it is exact but for rounding. The arithmetic is in float64 on the host; a code that lies within rounding of its
threshold may fall on the other side of it.
"""

from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_topk import BatchTopKSAE
from interp_jax.sae.gated import GatedSAE
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.relu import ReLUSAE

__all__ = ["as_jumprelu", "uncentred"]

S = TypeVar("S", bound=SparseAutoencoder)


def as_jumprelu(sae: SparseAutoencoder) -> JumpReLUSAE:
    """A JumpReLU that computes the same codes.

    BatchTopK and Matryoshka are one outside training, by their threshold; ReLU has the threshold zero. A gated one,
    whose two paths share the encoder, is one too (Rajamanoharan et al. 2024, appendix): with m = exp(r_mag), its gate
    `p + b_gate > 0` says that the magnitude's `p m + b_mag` exceeds `b_mag - b_gate m`.

    Args:
        sae: the autoencoder.

    Returns:
        The JumpReLU; itself if it is one.

    Raises:
        ValueError: for TopK, where one latent's code depends on the others'.
    """
    if isinstance(sae, JumpReLUSAE):
        return sae
    arrays: dict[str, Any] = {name: sae.parameter(name) for name in ("W_enc", "W_dec", "b_dec")}
    arrays["W_skip"] = None if sae.W_skip is None else sae.W_skip[...]
    if isinstance(sae, GatedSAE):
        gate, magnitude, log_scale = (_wide(sae.parameter(name)) for name in ("b_gate", "b_mag", "r_mag"))
        scale = np.exp(log_scale)
        arrays["W_enc"] = _like(_wide(sae.W_enc[...]) * scale, sae.W_enc[...])
        arrays["b_enc"] = sae.b_mag[...]
        arrays["threshold"] = _like(magnitude - gate * scale, sae.b_gate[...])
    elif isinstance(sae, BatchTopKSAE):
        arrays |= {"b_enc": sae.b_enc[...], "threshold": sae.threshold[...]}
    elif isinstance(sae, ReLUSAE):
        arrays |= {"b_enc": sae.b_enc[...], "threshold": jnp.zeros_like(sae.b_enc[...])}
    else:
        raise ValueError(
            f"a {type(sae).__name__} cannot be written as a JumpReLU: whether a latent is active depends on more than "
            "its own pre-activation. Use the layout saelens or sparsify."
        )
    return JumpReLUSAE(**arrays, apply_b_dec_to_input=sae.apply_b_dec_to_input)


def uncentred(sae: S) -> S:
    """The autoencoder with `b_dec` no longer subtracted from the input: its product with the encoder goes into biases.

    Args:
        sae: the autoencoder.

    Returns:
        One of the same kind with `apply_b_dec_to_input=False`; itself if it is one.
    """
    if not sae.apply_b_dec_to_input:
        return sae
    shift = _wide(sae.b_dec[...]) @ _wide(sae.W_enc[...])
    scales: dict[str, np.ndarray | float]
    if isinstance(sae, GatedSAE):
        scales = {"b_gate": 1.0, "b_mag": np.exp(_wide(sae.r_mag[...]))}
    else:
        scales = {"b_enc": 1.0}
    biases = {
        name: _like(_wide(sae.parameter(name)) - shift * scale, sae.parameter(name)) for name, scale in scales.items()
    }
    new = sae.replace(**biases)
    new.apply_b_dec_to_input = False
    return new


def _wide(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _like(array: np.ndarray, original: Array) -> Array:
    return jnp.asarray(array.astype(original.dtype))
