"""A GGUF file seen as a Hugging Face checkpoint: the same config fields, tensor names and layouts.

So one path leads from either to a `Transformer` (`hugging_face.py`), and every other library's converter can read it
as well. What llama.cpp does to tensors when it writes a file is undone here, tensor by tensor, as each is asked for:

- rows of q and k of a Llama are permuted, since it turns neighbouring coordinates: (pair, half) in a head, where here
  it is (half, pair);
- norms of a Gemma hold 1 + weight;
- GPT-2's maps are `[out, in]`, and GPT-NeoX's fused projection is q of all heads, k of all heads, v of all heads.

Linear maps are `[out, in]` in both. A tied unembedding is absent from both.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from interp_jax.models.gguf_file import GgufFile
from interp_jax.models.hugging_face import opened_tensors
from interp_jax.models.transformer import Transformer
from interp_jax.models.weights import LoadOptions, OpenedModel, assemble

__all__ = ["GgufCheckpoint", "load_gguf", "open_gguf"]

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_GEMMA_2 = _LLAMA | {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_GPT_2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{i}.attn_norm": "gpt_neox.layers.{i}.input_layernorm",
    "blk.{i}.attn_qkv": "gpt_neox.layers.{i}.attention.query_key_value",
    "blk.{i}.attn_output": "gpt_neox.layers.{i}.attention.dense",
    "blk.{i}.ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "blk.{i}.ffn_down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}


# Settings that do not change the computation: at all, or at this value.
_SAYS_NOTHING = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_OFF = {
    "attention.causal": True, "attention.scale": 0.0, "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0,
    "expert_count": 0, "expert_used_count": 0, "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
}  # fmt: skip

_FREQUENCY_DIVISORS = "rope_freqs.weight"  # No weight: what each rotary frequency is divided by.


@dataclasses.dataclass(frozen=True)
class _Architecture:
    model_type: str
    names: dict[str, str]
    """GGUF's name to Hugging Face's, both without `.weight` or `.bias`."""
    undo: Callable[["GgufCheckpoint", str, np.ndarray], np.ndarray]
    """From the file's layout to Hugging Face's, for a tensor by its name in the file."""


class GgufCheckpoint:
    """The tensors and the config of a GGUF file, as Hugging Face has them."""

    def __init__(self, gguf_file: GgufFile | str | Path):
        """Reads the header.

        Args:
            gguf_file: The file, or its path.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no whole GGUF file, or its architecture is not known.
        """
        self.file = gguf_file if isinstance(gguf_file, GgufFile) else GgufFile(gguf_file)
        self.name = self.file.require("general.architecture")
        if self.name not in _ARCHITECTURES:
            raise ValueError(
                f"{self.file.path} is of the architecture {self.name!r}; known are {', '.join(_ARCHITECTURES)}."
            )
        self._architecture = _ARCHITECTURES[self.name]
        self._read: set[str] = set()
        self._stored = {self._theirs(name): name for name in self.file.shapes if name != _FREQUENCY_DIVISORS}

    @property
    def path(self) -> str:
        """The file."""
        return self.file.path

    @property
    def names(self) -> Iterable[str]:
        """All tensors, named as on Hugging Face where they are known there."""
        return self._stored

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in Hugging Face's layout."""
        stored = self._stored[name]
        return self._architecture.undo(self, stored, self.file.tensor(stored))

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value of the architecture; an error if it is not there and there is no default."""
        self._read.add(key)
        if default is None:
            return self.file.require(f"{self.name}.{key}")
        return self.file.metadata.get(f"{self.name}.{key}", default)

    @property
    def fields(self) -> dict[str, Any]:
        """What its config.json would say."""
        n_heads, d_model = self.value("attention.head_count"), self.value("embedding_length")
        if isinstance(n_heads, list):
            raise ValueError(f"{self.path} has another number of heads in each layer, which is not supported.")
        d_head = self.value("attention.key_length", d_model // n_heads)
        is_tied = "output.weight" not in self.file.shapes
        fields: dict[str, Any] = {
            "model_type": self._architecture.model_type,
            "vocab_size": self.file.shapes.get("token_embd.weight", (0,))[0],
            "hidden_size": d_model, "num_hidden_layers": self.value("block_count"), "num_attention_heads": n_heads,
            "num_key_value_heads": self.value("attention.head_count_kv", n_heads), "head_dim": d_head,
            "intermediate_size": self.value("feed_forward_length"),
            "max_position_embeddings": self.value("context_length"), "tie_word_embeddings": is_tied,
            # The value of the GGUF specification where a file is silent.
            "rope_theta": self.value("rope.freq_base", 10000.0), "rope_scaling": self._rope_scaling(),
        }  # fmt: skip
        if self.name in ("gpt2", "gptneox"):
            epsilon = self.value("attention.layer_norm_epsilon")
        else:
            epsilon = self.value("attention.layer_norm_rms_epsilon")
        fields |= {"rms_norm_eps": epsilon, "layer_norm_epsilon": epsilon, "layer_norm_eps": epsilon}
        fields |= self._special_fields(d_head)
        widths = ["attention.value_length", *([] if self.name == "gptneox" else ["rope.dimension_count"])]
        for key in widths:
            if self.value(key, d_head) != d_head:
                raise ValueError(
                    f"{self.path} has {key}={self.value(key)}; only a head's width, {d_head}, is supported."
                )
        self._refuse_what_was_not_read()
        return fields

    def _refuse_what_was_not_read(self) -> None:
        """Settings that may change the computation, and that nothing here has looked at."""
        start = f"{self.name}."
        settings = {k.removeprefix(start): v for k, v in self.file.metadata.items() if k.startswith(start)}
        unread = [
            f"{key}={value}" for key, value in settings.items()
            if key not in self._read and key not in _SAYS_NOTHING and (key not in _OFF or value != _OFF[key])
        ]  # fmt: skip
        if unread:
            raise ValueError(
                f"{self.path} has settings that are not known for the architecture {self.name!r}, and that may change "
                f"what the model computes: {', '.join(unread)[:500]}."
            )

    def _special_fields(self, d_head: int) -> dict[str, Any]:
        match self.name:
            case "gpt2":
                sizes = {"n_embd": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count"}
                sizes |= {"n_positions": "context_length", "n_inner": "feed_forward_length"}
                return {theirs: self.value(ours) for theirs, ours in sizes.items()}
            case "gptneox":
                is_parallel = self.value("use_parallel_residual")
                return {"rotary_pct": self.value("rope.dimension_count") / d_head, "use_parallel_residual": is_parallel}
            case "llama":
                has_bias = "blk.0.attn_q.bias" in self.file.shapes
                return {"attention_bias": has_bias, "mlp_bias": "blk.0.ffn_up.bias" in self.file.shapes}
            case "gemma2":
                scalar = self._query_scalar(d_head, n_layers_of_largest=46)
                return {
                    "sliding_window": self.value("attention.sliding_window", 4096), "query_pre_attn_scalar": scalar,
                    "layer_types": self._layer_types(2),
                    "attn_logit_softcapping": self.value("attn_logit_softcapping", 50.0),
                    "final_logit_softcapping": self.value("final_logit_softcapping", 30.0),
                }  # fmt: skip
            case "gemma3":
                scalar = self._query_scalar(d_head, n_layers_of_largest=62)
                return {
                    "sliding_window": self.value("attention.sliding_window"), "query_pre_attn_scalar": scalar,
                    "layer_types": self._layer_types(6),
                    "rope_local_base_freq": self.value("rope.freq_base_swa", 10000.0),
                    "final_logit_softcapping": self.value("final_logit_softcapping", 0.0) or None,
                }  # fmt: skip
            case _:
                return {}

    def _layer_types(self, usual: int) -> list[str]:
        """Which layers are local, by the file or as is usual: the last of so many is not. 0 means all of them."""
        pattern, n_layers = self.value("attention.sliding_window_pattern", usual), self.value("block_count")
        if not isinstance(pattern, list):
            pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(n_layers)]
        return ["sliding_attention" if is_local else "full_attention" for is_local in pattern]

    def _query_scalar(self, d_head: int, *, n_layers_of_largest: int) -> int:
        """What q is divided by the root of. The file does not say: a head's width, but for the largest of a family."""
        if self.value("block_count") != n_layers_of_largest:
            return d_head
        return self.value("embedding_length") // self.value("attention.head_count")

    def _rope_scaling(self) -> dict[str, Any] | None:
        factor, kind = self.value("rope.scaling.factor", 0.0), self.value("rope.scaling.type", "")
        context = self.value("rope.scaling.original_context_length", 0)
        if _FREQUENCY_DIVISORS in self.file.shapes:  # Llama 3.1's scaling, worked out for each frequency.
            return {"rope_type": "each", "divisors": self.file.tensor(_FREQUENCY_DIVISORS).tolist()}
        kind = kind or ("linear" if factor else "none")  # As llama.cpp reads a factor alone.
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": factor or self.value("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = context or self.value("rope.scaling.original_context_length")
        elif kind != "linear":
            raise ValueError(
                f"{self.path} scales its rotary positions by {kind!r}; supported in GGUF are 'linear' and 'yarn'."
            )
        return scaling

    def _theirs(self, name: str) -> str:
        found = re.fullmatch(r"(?P<start>blk\.(?P<layer>\d+)\.)?(?P<rest>.+)\.(?P<kind>weight|bias)", name)
        if found is None:
            return name
        ours = ("blk.{i}." if found["start"] else "") + found["rest"]
        theirs = self._architecture.names.get(ours)
        return name if theirs is None else f"{theirs.replace('{i}', found['layer'] or '')}.{found['kind']}"


def _as_it_is(checkpoint: GgufCheckpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor


def _undo_llama(checkpoint: GgufCheckpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return tensor
    n_heads = checkpoint.value("attention.head_count")
    heads = n_heads if part == "attn_q" else checkpoint.value("attention.head_count_kv", n_heads)
    return tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def _undo_gemma(checkpoint: GgufCheckpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor - 1 if name.endswith("norm.weight") else tensor


def _undo_gpt2(checkpoint: GgufCheckpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    maps = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return tensor.T if name.endswith(maps) else tensor


def _undo_gpt_neox(checkpoint: GgufCheckpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    if "attn_qkv" not in name:
        return tensor
    n_heads = checkpoint.value("attention.head_count")
    return tensor.reshape(3, n_heads, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


_ARCHITECTURES = {
    "llama": _Architecture("llama", _LLAMA, _undo_llama),
    "qwen2": _Architecture("qwen2", _LLAMA, _as_it_is),
    "qwen3": _Architecture("qwen3", _LLAMA, _as_it_is),
    "gemma": _Architecture("gemma", _LLAMA, _undo_gemma),
    "gemma2": _Architecture("gemma2", _GEMMA_2, _undo_gemma),
    "gemma3": _Architecture("gemma3_text", _GEMMA_2, _undo_gemma),
    "gpt2": _Architecture("gpt2", _GPT_2, _undo_gpt2),
    "gptneox": _Architecture("gpt_neox", _GPT_NEOX, _undo_gpt_neox),
}


def load_gguf(path: str | Path | GgufFile, **options: Unpack[LoadOptions]) -> Transformer:
    """A model from a GGUF file, dequantised.

    Args:
        path: The file.
        **options: See `LoadOptions`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, its architecture is not known, or its tensors are not those of its metadata;
            missing and unknown ones are listed under Hugging Face's names.
    """
    return assemble(open_gguf(path), **options)


def open_gguf(path: str | Path | GgufFile) -> OpenedModel:
    """The same without reading a tensor.

    Args:
        path: The file.

    Returns:
        The opened file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its architecture is not known.
    """
    checkpoint = GgufCheckpoint(path)
    return opened_tensors(checkpoint, checkpoint.fields)
