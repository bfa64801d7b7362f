"""What a `Transformer` is: its sizes, and which of the known ways each part is computed.

One frozen dataclass covers GPT-2, GPT-Neo, GPT-NeoX (Pythia), Llama 2 and 3 (SmolLM2, Mistral), Qwen 2 and 3 and Gemma
1, 2 and 3. What differs between families is a field here and a branch where the quantity is computed; nothing in the
model's code knows a family by name.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

__all__ = ["RotaryScaling", "TransformerConfig"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are lowered for a context longer than the one trained on first.

    - 'linear': every frequency is divided by `factor`.
    - 'llama3': those that turn less than `low_frequency_factor` times in the original context are divided by `factor`,
      those that turn more than `high_frequency_factor` times are kept, and between the two it is gradual in the number
      of turns (Llama 3.1).
    - 'yarn': the same idea, gradual in the number of the frequency; queries and keys grow by `attention_factor` besides
      (Peng et al. 2023, "YaRN", sections 3.2 and 3.4).
    - 'each': every frequency has a divisor of its own, in `divisors`.

    Raises:
        ValueError: The kind is unknown, or has no divisors.
    """

    kind: Literal["linear", "llama3", "yarn", "each"]
    """Which of them."""
    factor: float = 1.0
    """What frequencies are divided by."""
    low_frequency_factor: float = 1.0
    """llama3 and yarn (there called beta slow): turns in the original context below which `factor` counts in full."""
    high_frequency_factor: float = 4.0
    """llama3 and yarn (there called beta fast): turns in the original context above which a frequency stays."""
    original_context: int = 8192
    """llama3 and yarn: the context trained on first, in tokens."""
    whole_numbers: bool = True
    """yarn: whether the two frequencies between which it is gradual are rounded outwards to whole numbers."""
    attention_factor: float = 1.0
    """What queries and keys are multiplied with."""
    divisors: tuple[float, ...] = ()
    """each: what each frequency is divided by."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn", "each"):
            raise ValueError(f"RotaryScaling.kind is {self.kind!r}; it must be 'linear', 'llama3', 'yarn' or 'each'.")

    def apply(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """Lowers frequencies `base ** (-i / n)` for i from 0 to n - 1, in radians a position."""
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "each":
            return frequencies / np.asarray(self.divisors)
        turns = self.original_context * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind == "llama3":
            kept = (turns - low) / (high - low)
        else:
            # Where in the row of frequencies one would turn so often: their logarithms fall by equal steps.
            first, last = (len(frequencies) * math.log(turns[0] / n, base) for n in (high, low))
            if self.whole_numbers:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * len(frequencies) - 1)
            kept = 1 - (np.arange(len(frequencies)) - first) / (last - first or 0.001)
        kept = np.clip(kept, 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and kind of a `Transformer`.

    Raises:
        ValueError: A size below 1, heads that do not share out evenly over key-value heads, an odd number of rotary
            coordinates, an unknown norm, activation or kind of positions, or local layers that do not fit.
    """

    vocab_size: int
    """Number of token ids."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of key and value heads; each serves n_heads / n_kv_heads query heads, in order."""
    d_head: int
    """Width of one head."""
    d_mlp: int
    """Number of neurons in an MLP."""
    context: int
    """Longest sequence, in tokens."""
    norm: str = "rms"
    """'rms' is RMSNorm (a scale), 'layer' is LayerNorm (a scale and a bias)."""
    norm_epsilon: float = 1e-5
    """Added to the mean square or variance under the root."""
    norm_offset: float = 0.0
    """Added to every norm's scale before it multiplies; 1 in Gemma, whose files hold the difference from 1."""
    post_norms: bool = False
    """Whether what attention and MLP give is normed before it is added to the stream (Gemma 2 and 3)."""
    qk_norm: bool = False
    """Whether q and k are normed over each head (RMSNorm with a scale), before rotary (Qwen 3, Gemma 3)."""
    activation: str = "silu"
    """Nonlinearity of the MLP: 'silu', 'gelu' (the exact one), 'gelu_tanh' (its tanh form, "gelu_new"), 'gelu_sigmoid'
    (x sigmoid(1.702 x), "quick_gelu"), 'relu' or 'relu_squared'."""
    gated_mlp: bool = True
    """Whether the MLP is act(x W_gate) * (x W_in) or plain act(x W_in)."""
    parallel_residual: bool = False
    """Whether attention and MLP both read the block's input and are added together (GPT-NeoX); no `resid_mid` then."""
    positions: str = "rotary"
    """'rotary' turns queries and keys; 'learned' adds a row of `W_pos` to each embedding (GPT-2, GPT-Neo)."""
    rotary_dim: int | None = None
    """How many coordinates of a head are turned, from the first; all when None."""
    rotary_base: float = 10000.0
    """Rotary frequency i of rotary_dim / 2 is rotary_base ** (-2 i / rotary_dim) radians a position."""
    rotary_base_local: float | None = None
    """The base in local layers; the same when None. Gemma 3 has another, and does not scale it."""
    rotary_scaling: RotaryScaling | None = None
    """How the frequencies of `rotary_base` are lowered."""
    window: int | None = None
    """In local layers, how many positions a query sees, itself included."""
    local_layers: tuple[bool, ...] | None = None
    """Which layers are local; all of them when None, if there is a window."""
    attn_scale: float | None = None
    """What q.k is multiplied with; 1 / sqrt(d_head) when None."""
    attn_scale_falls: bool = False
    """Whether layer i (from 0) divides q.k by i + 1 besides (an option of GPT-2's)."""
    attn_soft_cap: float | None = None
    """If c is given, attention logits x become c tanh(x / c) (Gemma 2)."""
    logit_soft_cap: float | None = None
    """The same for the model's logits."""
    embed_scale: float = 1.0
    """What embeddings are multiplied with; sqrt(d_model) in Gemma."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    attn_out_bias: bool = False
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool = False
    """Whether the MLP's matrices have biases."""
    tied_embeddings: bool = True
    """Whether the unembedding is the transpose of the embedding."""
    unembed_bias: bool = False
    """Whether the logits have a bias."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "context")
        for size in sizes:
            if getattr(self, size) < 1:
                raise ValueError(f"TransformerConfig.{size} is {getattr(self, size)}; it must be at least 1.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"TransformerConfig has n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}; "
                "n_heads must be a multiple of n_kv_heads."
            )
        if self.positions == "rotary" and (self.n_rotary % 2 or not 0 < self.n_rotary <= self.d_head):
            name = "d_head" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(
                f"TransformerConfig.{name} is {self.n_rotary}; rotary positions need an even one, of at most d_head="
                f"{self.d_head}."
            )
        choices = {
            "norm": ("rms", "layer"), "positions": ("rotary", "learned"),
            "activation": ("silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu_squared"),
        }  # fmt: skip
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"TransformerConfig.{field} is {getattr(self, field)!r}; it must be one of "
                    f"{', '.join(map(repr, known))}."
                )
        if self.local_layers is not None and (self.window is None or len(self.local_layers) != self.n_layers):
            raise ValueError(
                f"TransformerConfig.local_layers names {len(self.local_layers)} layers, with window={self.window}; "
                f"it needs a window and one value for each of the {self.n_layers} layers."
            )

        scaling = self.rotary_scaling
        if scaling is not None and scaling.kind == "each" and len(scaling.divisors) != self.n_rotary // 2:
            raise ValueError(
                f"RotaryScaling.divisors has {len(scaling.divisors)} values; {self.n_rotary} turned coordinates have "
                f"{self.n_rotary // 2} frequencies."
            )

    @property
    def n_rotary(self) -> int:
        """How many coordinates of a head are turned."""
        return self.d_head if self.rotary_dim is None else self.rotary_dim

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For each layer, whether its queries see only the window."""
        if self.local_layers is not None:
            return self.local_layers
        return (self.window is not None,) * self.n_layers

    @property
    def scale(self) -> float:
        """What q.k is multiplied with."""
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    def rotary_frequencies(self, *, local: bool) -> np.ndarray:
        """Radians a position, for each pair of turned coordinates.

        Args:
            local: of the local layers.

        Returns:
            [n_rotary / 2], float64.
        """
        exponents = -np.arange(0, self.n_rotary, 2) / self.n_rotary
        if local and self.rotary_base_local is not None:
            return self.rotary_base_local**exponents
        frequencies = self.rotary_base**exponents
        return frequencies if self.rotary_scaling is None else self.rotary_scaling.apply(frequencies, self.rotary_base)

    def rotary_attention_factor(self, *, local: bool) -> float:
        """What turned queries and keys are multiplied with.

        Args:
            local: in the local layers.

        Returns:
            A factor, 1 unless the rotary scaling has one.
        """
        if self.rotary_scaling is None or (local and self.rotary_base_local is not None):
            return 1.0
        return self.rotary_scaling.attention_factor

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "TransformerConfig":
        """What `as_json` gave, after a way through a file that knows lists and tables only."""
        fields = dict(fields)
        if fields.get("local_layers") is not None:
            fields["local_layers"] = tuple(fields["local_layers"])
        if fields.get("rotary_scaling") is not None:
            scaling: dict[str, Any] = dict(fields["rotary_scaling"])
            scaling["divisors"] = tuple(scaling.get("divisors", ()))
            fields["rotary_scaling"] = RotaryScaling(**scaling)
        return TransformerConfig(**fields)

    def as_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and all sizes: what a file holds."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                fields[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore[reportArgumentType]
        return fields
