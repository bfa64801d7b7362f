"""What all sparse autoencoders share: the arrays, the two ends of the encoder, and what training asks of each kind.

    codes = nonlinearity((x - b_dec) @ W_enc + biases);   output = codes @ W_dec + b_dec (+ W_skip @ x)

`W_dec[d_sae, d_out]` is the dictionary, one row a latent. Each kind of autoencoder is a file of its own beside this one
and differs in the nonlinearity and in its objective alone.

**Transcoders** (Dunefsky et al. 2024) predict another activation than the one they read: an MLP's output from its
input. Here every kind is one where `d_out` is another width or the target another activation; then `b_dec` is not
subtracted from the input. With `W_skip` it has a linear path around the latents (Paulo et al. 2025).

An autoencoder is a `flax.nnx` module whose only state is arrays, so it is a pytree: differentiate it, map over it, put
it on a mesh. What is not an array (`k`, a bandwidth) is part of its structure. It is changed by `replace`, which
gives a new one.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from interp_jax.sae.column_sums import over_rows

__all__ = [
    "Batch",
    "Outcome",
    "SparseAutoencoder",
    "Sparsity",
    "affine",
    "check_sizes",
    "known_affine",
    "random_arrays",
    "with_gradient",
]

S = TypeVar("S", bound="SparseAutoencoder")


class Sparsity(NamedTuple):
    """How strongly codes are pressed to be sparse; kinds that fix the number of latents do not look at it."""

    coefficient: Float[Array, ""] | float = 0.0
    """Weight of the penalty in this step."""
    is_norm_weighted: bool = False
    """Whether L1 counts a code times the norm of its dictionary row; without it rows must be held to a norm."""
    l0_target: float | None = None
    """JumpReLU: the penalty is `(l0 / l0_target - 1)^2`, not the L0."""


class Batch(NamedTuple):
    """What one step is trained on."""

    x: Float[Array, "batch d_in"]
    """Activations."""
    target: Float[Array, "batch d_out"]
    """What is to be reconstructed: `x`, but for a transcoder."""
    row_weights: Float[Array, "batch"]
    """Weight of each row's error."""

    def squared_error(self, error: Float[Array, "*prefixes batch d_out"]) -> Float[Array, "*prefixes"]:
        """The weighted mean over rows of an error's square.

        Args:
            error: target less output.
        """
        return jnp.mean(self.row_weights * jnp.sum(jnp.square(error), axis=-1), axis=-1)


class Outcome(NamedTuple):
    """What one batch gave under an objective."""

    loss: Float[Array, ""]
    """What is minimised: squared error, penalty, and whatever else the kind adds."""
    squared_error: Float[Array, ""]
    """Weighted mean over rows of the squared error's sum."""
    error: Float[Array, "batch d_out"]
    """Target less output."""
    firings: Int[Array, "d_sae"]
    """In how many rows each latent is active."""
    threshold: Float[Array, ""]
    """BatchTopK: the least code that was kept in this batch; zero for other kinds."""


class SparseAutoencoder(nnx.Module):
    """The arrays and sizes that all kinds have; see the module's docstring."""

    code_offsets: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters in units of the codes: biases and thresholds, which a change of units scales."""
    encoder_bias: ClassVar[str] = "b_enc"
    """The bias that decides whether a latent is active."""

    def __init__(
        self,
        *,
        W_enc: Float[Array, "_d_in _d_sae"],
        W_dec: Float[Array, "_d_sae _d_out"],
        b_dec: Float[Array, "_d_out"],
        W_skip: Float[Array, "_d_out _d_in"] | None = None,
        apply_b_dec_to_input: bool = True,
    ):
        """Checks and takes the arrays that all kinds have.

        Args:
            W_enc: encoder.
            W_dec: dictionary.
            b_dec: decoder bias.
            W_skip: a transcoder's linear path from input to output.
            apply_b_dec_to_input: whether `b_dec` is subtracted from the input.

        Raises:
            ValueError: if the shapes do not fit one another.
        """
        if W_dec.ndim != 2 or W_enc.ndim != 2:
            raise ValueError(
                f"W_enc has shape {W_enc.shape} and W_dec {W_dec.shape}; expected [d_in, d_sae] and [d_sae, d_out]."
            )
        (d_in, d_sae), d_out = W_enc.shape, W_dec.shape[1]
        check_sizes(d_in, d_sae)
        found = {"W_dec": W_dec.shape, "b_dec": b_dec.shape}
        expected = {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
        if W_skip is not None:
            found["W_skip"], expected["W_skip"] = W_skip.shape, (d_out, d_in)
        _check_shapes(f"W_enc {W_enc.shape}", found, expected)
        if apply_b_dec_to_input and d_out != d_in:
            raise ValueError(
                f"d_in is {d_in} and d_out {d_out}: b_dec cannot be subtracted from the input. A transcoder "
                "has apply_b_dec_to_input=False."
            )
        self.W_enc = nnx.Param(W_enc)
        self.W_dec = nnx.Param(W_dec)
        self.b_dec = nnx.Param(b_dec)
        self.W_skip = None if W_skip is None else nnx.Param(W_skip)
        self.apply_b_dec_to_input = apply_b_dec_to_input

    def _set_per_latent(self, **arrays: Float[Array, "_d_sae"]) -> None:
        """Takes parameters of one number a latent."""
        _check_shapes(
            f"W_enc {self.W_enc.shape}",
            {name: array.shape for name, array in arrays.items()},
            dict.fromkeys(arrays, (self.d_sae,)),
        )
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))
        self.per_latent = tuple(arrays)

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the output; that of the input, but for a transcoder."""
        return self.W_dec.shape[1]

    def pre_activations(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """The encoder's output before its nonlinearity: the gate's, in a gated autoencoder.

        Args:
            x: activations.
        """
        _check_width("The activations have", x, "d_in", self.d_in)
        return affine(x, self.input_shift(), self.W_enc[...], self.parameter(self.encoder_bias))

    def input_shift(self) -> Float[Array, "d_in"]:
        """What is subtracted from the input: `b_dec`, or nothing."""
        b_dec = self.b_dec[...]
        return b_dec if self.apply_b_dec_to_input else jnp.zeros(self.d_in, b_dec.dtype)

    @abc.abstractmethod
    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes of activations.

        Args:
            x: activations.
        """

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_out"]:
        """The activations that dense codes stand for, without a transcoder's skip.

        Args:
            codes: dense codes.
        """
        _check_width("The codes have", codes, "d_sae", self.d_sae)
        return codes @ self.W_dec[...] + self.b_dec[...]

    def skipped(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"] | float:
        """What goes around the latents: `W_skip @ x`, zero where there is no skip.

        Args:
            x: activations.
        """
        return 0.0 if self.W_skip is None else x @ self.W_skip[...].T

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """The reconstruction of activations; a transcoder's prediction.

        Args:
            x: activations.
        """
        return self.decode(self.encode(x)) + self.skipped(x)

    @abc.abstractmethod
    def objective(self, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None) -> Outcome:
        """What training minimises, with what it is made of; differentiable with respect to the autoencoder, not to x.

        Args:
            batch: what the step is trained on.
            sparsity: strength and form of the penalty.
            mesh: what the arrays lie on (`interp_jax.sae.mesh`); None where that is one device.
        """

    def objective_and_gradient(
        self: S, batch: Batch, sparsity: Sparsity, mesh: Mesh | None = None
    ) -> tuple[Outcome, S]:
        """What training minimises, and its gradient by the autoencoder's parameters.

        Args:
            batch: what the step is trained on.
            sparsity: strength and form of the penalty.
            mesh: what the arrays lie on; None where that is one device.
        """
        return with_gradient(lambda sae: sae.objective(batch, sparsity, mesh), self)

    def replace(self: S, **arrays: Any) -> S:
        """A copy with other arrays.

        Args:
            **arrays: parameters by name.
        """
        new = jax.tree.map(lambda leaf: leaf, self)
        for name, array in arrays.items():
            setattr(new, name, nnx.Param(array))
        return new

    def parameter(self, name: str) -> Array:
        """A parameter by its name."""
        return getattr(self, name)[...]

    def in_units(self: S, input_scale: Float[Array, ""], output_scale: Float[Array, ""]) -> S:
        """The autoencoder for unscaled activations, of one for inputs and outputs multiplied by scalars.

        With s the one scale of both, `relu(s x W + b) = s relu(x W + b / s)`: codes are s times smaller, and so is the
        reconstruction; dictionary rows keep their norm.

        Args:
            input_scale: what inputs were multiplied by.
            output_scale: what targets were multiplied by; the same where `b_dec` is subtracted from the input.
        """
        ratio = input_scale / output_scale
        arrays = {"W_enc": self.W_enc[...] * ratio, "b_dec": self.b_dec[...] / output_scale}
        arrays |= {name: self.parameter(name) / output_scale for name in self.code_offsets}
        if self.W_skip is not None:
            arrays["W_skip"] = self.W_skip[...] * ratio
        return self.replace(**arrays)


def with_gradient(objective: Callable[[S], Outcome], sae: S) -> tuple[Outcome, S]:
    """The outcome of an objective, and its loss' gradient by the autoencoder's parameters.

    Args:
        objective: a function of the autoencoder.
        sae: the autoencoder.
    """

    def loss_and_outcome(sae: S) -> tuple[Array, Outcome]:
        outcome = objective(sae)
        return outcome.loss, outcome

    (_, outcome), gradient = jax.value_and_grad(loss_and_outcome, has_aux=True)(sae)
    return outcome, gradient


def random_arrays(
    d_in: int, d_sae: int, *, key: PRNGKeyArray, d_out: int | None = None, has_skip: bool = False
) -> dict[str, Any]:
    """Arrays to start from: unit dictionary rows in random directions, zero biases, no skip yet.

    The encoder is the dictionary's transpose. A transcoder, whose two ends are of different spaces, starts with
    directions of its own at each.

    Args:
        d_in: width of the activations that are read.
        d_sae: number of latents.
        key: random key.
        d_out: width of a transcoder's output; None for an autoencoder.
        has_skip: whether there is a linear path around the latents.

    Raises:
        ValueError: if a size is not positive.
    """
    check_sizes(d_in, d_sae, 1 if d_out is None else d_out)
    if d_out is None:
        W_dec = _unit_rows(key, d_sae, d_in)
        arrays: dict[str, Any] = {"W_enc": W_dec.T, "W_dec": W_dec, "b_dec": jnp.zeros(d_in)}
    else:
        key_in, key_out = jax.random.split(key)
        W_enc = _unit_rows(key_in, d_sae, d_in).T
        arrays = {"W_enc": W_enc, "W_dec": _unit_rows(key_out, d_sae, d_out), "b_dec": jnp.zeros(d_out)}
        arrays["apply_b_dec_to_input"] = False
    if has_skip:
        arrays["W_skip"] = jnp.zeros((d_in if d_out is None else d_out, d_in))
    return arrays


def _unit_rows(key: PRNGKeyArray, n: int, width: int) -> Float[Array, "n width"]:
    rows = jax.random.normal(key, (n, width))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def check_sizes(d_in: int, d_sae: int, d_out: int = 1) -> None:
    """Raises ValueError for sizes that no autoencoder can have."""
    if min(d_in, d_sae, d_out) < 1:
        raise ValueError(f"d_in is {d_in}, d_sae {d_sae} and d_out {d_out}; expected at least 1 each.")


def _check_width(what: str, value: Array, name: str, width: int) -> None:
    if value.shape[-1:] != (width,):
        raise ValueError(f"{what} the shape {value.shape}; expected [..., {width}], the autoencoder's {name}.")


def _check_shapes(reference: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    wrong = [f"{name} {found[name]}, not {expected[name]}" for name in found if found[name] != expected[name]]
    if wrong:
        raise ValueError(f"shapes do not fit {reference}: {'; '.join(wrong)}.")


@jax.custom_jvp
def affine(
    x: Float[Array, "*batch d_in"], shift: Float[Array, "d_in"], matrix: Float[Array, "d_in n"], bias: Float[Array, "n"]
) -> Float[Array, "*batch n"]:
    """`(x - shift) @ matrix + bias`, whose derivatives by `shift` and `bias` cost next to nothing.

    Plain reverse mode would multiply every row's cotangent by the matrix and add the results up; the sum of the
    cotangents, which is the bias' gradient, multiplied once, is the same.

    Args:
        x: rows.
        shift: what is subtracted from each.
        matrix: what they are multiplied by.
        bias: what is added to each.
    """
    return (x - shift) @ matrix + bias


def _affine_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]):
    x, shift, matrix, bias = primals
    by_x, by_shift, by_matrix, by_bias = tangents
    output = affine(x, shift, matrix, bias)
    terms, row = [], []
    if not isinstance(by_x, SymbolicZero):
        terms.append(by_x @ matrix)
    if not isinstance(by_matrix, SymbolicZero):
        terms.append((x - shift) @ by_matrix)
    if not isinstance(by_shift, SymbolicZero):
        row.append(-(by_shift @ matrix))
    if not isinstance(by_bias, SymbolicZero):
        row.append(by_bias)
    if row:
        terms.append(over_rows(sum(row[1:], row[0]), output.size // output.shape[-1]).reshape(output.shape))
    return output, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(output)


affine.defjvp(_affine_jvp, symbolic_zeros=True)


@jax.custom_vjp
def known_affine(
    output: Float[Array, "*batch n"],
    x: Float[Array, "*batch d_in"],
    shift: Float[Array, "d_in"],
    matrix: Float[Array, "d_in n"],
    bias: Float[Array, "n"],
) -> Float[Array, "*batch n"]:
    """`affine`, whose output was computed before; differentiable by shift, matrix and bias.

    Args:
        output: the output.
        x: rows.
        shift: what is subtracted from each.
        matrix: what they are multiplied by.
        bias: what is added to each.
    """
    return output


def _known_affine_backward(kept: tuple[Array, ...], gradient: Array):
    x, *parameters = kept
    return None, None, *jax.vjp(lambda *parameters: affine(x, *parameters), *parameters)[1](gradient)


known_affine.defvjp(lambda output, *given: (output, given), _known_affine_backward)
