"""How an autoencoder is trained: one flat, frozen configuration.

Its fields are the options of `interp-jax sae train`, and their docstrings the help. A field that only one kind of
autoencoder reads is refused where another kind is given it, so that no setting is silently without effect.
"""

import dataclasses
import math
from typing import Any, Literal

from interp_jax.sae.autoencoder import check_sizes
from interp_jax.sae.matryoshka import check_widths
from interp_jax.sae.topk import check_k

__all__ = ["TrainConfig"]

_READ_BY: dict[str, set[str]] = {
    "k": {"topk", "batch_topk", "matryoshka"},
    "widths": {"matryoshka"},
    "l1_coefficient": {"relu", "gated"},
    "is_l1_norm_weighted": {"relu", "gated"},
    "l0_coefficient": {"jumprelu"},
    "l0_target": {"jumprelu"},
    "bandwidth": {"jumprelu"},
    "initial_threshold": {"jumprelu"},
    "threshold_parameter": {"jumprelu"},
    "sparsity_warmup_share": {"relu", "gated", "jumprelu"},
    "k_aux": {"auxiliary_k"},
    "aux_coefficient": {"auxiliary_k"},
    "ghost_variant": {"ghost"},
    "ghost_activation": {"ghost"},
    "ghost_norm": {"ghost"},
    "ghost_all_steps": {"ghost"},
    "ghost_until": {"ghost"},
    "resample_every": {"resample"},
}
"""The fields that only some kinds, or some methods for dead latents, look at."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    architecture: Literal["topk", "batch_topk", "matryoshka", "relu", "gated", "jumprelu"] = "topk"
    """The kind of autoencoder."""
    d_out: int | None = None
    """A transcoder's width of output; None for an autoencoder. Batches are then pairs (input, target)."""
    has_skip: bool = False
    """A transcoder's linear path around the latents."""
    apply_b_dec_to_input: bool = True
    """Whether the decoder bias is subtracted from the input; never in a transcoder."""
    k: int = 32
    """topk: latents a row may use; batch_topk and matryoshka: latents a row uses on average."""
    widths: tuple[int, ...] = ()
    """matryoshka: rising numbers of latents that reconstruct alone; a 16th, 8th, quarter, half and all when empty."""
    l1_coefficient: float = 5.0
    """relu and gated: weight of L1 beside the squared error, for inputs of unit mean square."""
    is_l1_norm_weighted: bool = False
    """relu and gated: whether a code counts times the norm of its dictionary row."""
    l0_coefficient: float = 2.0
    """jumprelu: weight of L0 beside the squared error, for inputs of unit mean square."""
    l0_target: float | None = None
    """jumprelu: the penalty is (L0 / l0_target - 1)^2 instead of L0."""
    bandwidth: float = 0.3
    """jumprelu: width of the rectangle that estimates thresholds' derivatives, for inputs of unit mean square."""
    initial_threshold: float = 1.0
    """jumprelu: where thresholds start, for inputs of unit mean square."""
    threshold_parameter: Literal["threshold", "log_threshold"] = "log_threshold"
    """jumprelu: whether the threshold or its logarithm is trained."""
    sparsity_warmup_share: float = 0.1
    """relu, gated and jumprelu: share of the steps, at the start, over which the coefficient rises from zero."""
    decoder_norm: Literal["unit", "at_most_one", "free"] = "unit"
    """What dictionary rows are held to."""
    n_steps: int = 10_000
    """Training steps, one batch each."""
    learning_rate: float = 1e-3
    """Adam's learning rate after warm-up, for inputs of unit mean square."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    beta1: float = 0.0
    """Adam's decay of the gradient's mean; at zero that moment is not kept."""
    beta2: float = 0.999
    """Adam's decay of the gradient's mean square."""
    norm_cap: float = 3.0
    """Rows larger than this many times the median row count in the loss as if they were shrunk to it."""
    dead_after: int = 100_000
    """A latent that was not active for this many rows is dead."""
    dead_latents: Literal["auto", "auxiliary_k", "ghost", "resample", "lazy", "none"] = "auto"
    """What is done about dead latents; auto: auxiliary_k where k sets the L0, else lazy re-initialisation."""
    k_aux: int = 64
    """auxiliary_k: dead latents that a row may use in the auxiliary loss."""
    aux_coefficient: float = 1 / 32
    """auxiliary_k: weight of the auxiliary loss; zero switches it off."""
    ghost_variant: Literal["original", "rescaled", "dead_only_rescaled"] = "rescaled"
    """ghost: weight 1, or the share of dead latents; the last without a gradient to the decoder bias."""
    ghost_activation: Literal["exp", "capped_exp"] = "exp"
    """ghost: exp(x), or exp(min(x, 0))."""
    ghost_norm: Literal["residual", "input"] = "residual"
    """ghost: what the ghost output has half the norm of."""
    ghost_all_steps: int = 0
    """ghost: first steps in which every latent counts as dead."""
    ghost_until: int | None = None
    """ghost: the step from which it is off; None for never."""
    resample_every: int = 2500
    """resample: steps from one resampling to the next."""
    frequency_window: int = 1_000_000
    """Rows over which frequencies of latents are counted."""
    seed: int = 0
    """Seed of the initial directions and of what is drawn in training."""
    steps_per_dispatch: int = 1
    """Steps that one call of the compiled program does; more are faster where a step takes less than a millisecond."""
    log_every: int = 50
    """Steps from one line of metrics to the next."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next, where a checkpoint directory is given."""
    keep: int = 2
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        check_sizes(self.d_in, self.d_sae, 1 if self.d_out is None else self.d_out)
        if self.fixes_l0:
            check_k(self.k, self.d_sae)
        if self.architecture == "matryoshka":
            check_widths(self.prefixes, self.d_sae)
        self._check_numbers()
        self._check_unread()

    @property
    def fixes_l0(self) -> bool:
        """Whether k sets the number of active latents, and no penalty does."""
        return self.architecture in _READ_BY["k"]

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The Matryoshka widths, filled in."""
        if self.widths:
            return self.widths
        return tuple(sorted({max(1, self.d_sae // share) for share in (16, 8, 4, 2, 1)}))

    @property
    def revival(self) -> str:
        """What is done about dead latents, with auto filled in."""
        if self.dead_latents != "auto":
            return self.dead_latents
        return "auxiliary_k" if self.fixes_l0 else "lazy"

    @property
    def restarts(self) -> bool:
        """Whether dead latents are started again."""
        return self.revival in ("resample", "lazy")

    @property
    def sparsity_coefficient(self) -> float:
        """The coefficient of the penalty that this architecture has; zero where k sets the L0."""
        return {"relu": self.l1_coefficient, "gated": self.l1_coefficient, "jumprelu": self.l0_coefficient}.get(
            self.architecture, 0.0
        )

    def _check_numbers(self) -> None:
        for name in ("n_steps", "log_every", "checkpoint_every", "keep", "dead_after", "k_aux", "resample_every",
                     "frequency_window", "steps_per_dispatch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("learning_rate", "aux_coefficient", "warmup_steps", "l1_coefficient", "l0_coefficient",
                     "ghost_all_steps"):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a finite number, zero or more.")
        for name in ("bandwidth", "initial_threshold"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if self.l0_target is not None and not self.l0_target > 0:
            raise ValueError(f"l0_target is {self.l0_target}; expected a positive number of latents, or None.")
        if not self.norm_cap > 0:
            raise ValueError(f"norm_cap is {self.norm_cap}; expected a positive number, or inf for none.")
        for name in ("beta1", "beta2", "decay_share", "sparsity_warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1.")

    def _check_unread(self) -> None:
        if self.has_skip and self.d_out is None:
            raise ValueError("has_skip without d_out: an autoencoder would learn the path around it and nothing else.")
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)}
        for name, readers in _READ_BY.items():
            if getattr(self, name) != defaults[name] and not readers & {self.architecture, self.revival}:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but architecture={self.architecture!r} with "
                    f"dead_latents={self.revival!r} does not look at it; only {', '.join(sorted(readers))} does."
                )
        if self.revival == "auxiliary_k" and self.architecture in ("relu", "gated"):
            raise ValueError(
                f"auxiliary_k does nothing for {self.architecture}: a dead latent there is never positive, and "
                "auxiliary-k picks among positive ones. Use ghost, resample or lazy."
            )
        if self.decoder_norm == "free" and self.architecture in ("relu", "gated") and not self.is_l1_norm_weighted:
            raise ValueError(
                "decoder_norm='free' with a plain L1: the penalty would be lowered for nothing by longer rows. Set "
                "is_l1_norm_weighted, or hold the rows to a norm."
            )
