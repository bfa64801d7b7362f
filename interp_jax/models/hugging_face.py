"""Models from Hugging Face directories: `config.json`, `model.safetensors` (or shards with an index), `tokenizer.json`.

The config is read as data, field by field; what this project's `Transformer` cannot do is an error that names the field
and never a silent approximation. Weights are used as they are: nothing is folded, centred or rescaled. Each family is
one function from its config to ours, and one table of where its tensors are.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from interp_jax.models.safetensors_folder import SafetensorsFolder, read_json
from interp_jax.models.transformer import Transformer
from interp_jax.models.transformer_config import RotaryScaling, TransformerConfig
from interp_jax.models.weights import Layout, LoadOptions, OpenedModel, TensorSource, assemble

__all__ = ["FAMILIES", "config_from_hugging_face", "load_hugging_face", "open_hugging_face", "opened_tensors"]

Fields = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "silu": "silu",
    "swish": "silu", "relu": "relu", "gelu_python": "gelu", "gelu_accurate": "gelu_tanh", "quick_gelu": "gelu_sigmoid",
    "gelu_python_tanh": "gelu_tanh", "relu2": "relu_squared",
}  # fmt: skip

# Buffers of old checkpoints, which hold no weights; and the output head of a tied model, a copy of the embedding.
_BUFFERS = (r"\.attn\.(bias|masked_bias)$", r"\.attention\.(bias|masked_bias)$", r"rotary_emb\.inv_freq$")


# ---------------------------------------------------------------- configs


def config_from_hugging_face(fields: Fields) -> TransformerConfig:
    """Our config from the contents of a `config.json`.

    Args:
        fields: The parsed file.

    Returns:
        The config.

    Raises:
        ValueError: The family is not known, a field is missing, or a field asks for what `Transformer` does not do.
    """
    fields = _text_part(fields)
    _refuse_quantized(fields)
    try:
        return _family(fields)[0](fields)
    except KeyError as error:
        raise ValueError(f"The config.json of a {fields.get('model_type')!r} lacks the field {error}.") from None


def _text_part(fields: Fields) -> Fields:
    """The language model's config, where it is one part of several (Gemma 3 with vision)."""
    text = fields.get("text_config")
    if not isinstance(text, dict):
        return fields
    of_all = {name: fields[name] for name in ("tie_word_embeddings", "quantization_config") if name in fields}
    # The whole model's logits are not capped in `transformers`, whatever its part's config says.
    return of_all | text | {"final_logit_softcapping": None}


def _family(
    fields: Fields,
) -> tuple[Callable[[Fields], TransformerConfig], Callable[[TransformerConfig], dict[str, Layout]]]:
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"There is no family {name!r} (the config's model_type); there are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"The activation {name!r} is not known; known are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _refuse(fields: Fields, **only: Any) -> None:
    """Fields that may have one value only, where they are there at all."""
    for name, value in only.items():
        if fields.get(name, value) not in (value, None):
            raise ValueError(f"The config says {name}={fields[name]!r}; only {value!r} is supported.")


def _refuse_quantized(fields: Fields) -> None:
    quantized = fields.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"The config says that the weights are quantized ({method!r}). Quantized weights are read from GGUF files "
            "only: take one of those, or the model's unquantized weights."
        )


def _rotary(fields: Fields, layer_type: str = "full_attention", default_base: float = 10000.0) -> dict[str, Any]:
    """`rotary_base` and `rotary_scaling`, from the old fields or from `rope_parameters`."""
    parameters = fields.get("rope_parameters") or {}
    parameters = parameters.get(layer_type, parameters)
    scaling = parameters or fields.get("rope_scaling") or {}
    base = parameters.get("rope_theta", fields.get("rope_theta", default_base))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "dynamic"):  # 'dynamic' changes nothing up to max_position_embeddings, which is our context.
        found = None
    elif kind == "linear":
        found = RotaryScaling("linear", float(scaling["factor"]))
    elif kind == "llama3":
        found = RotaryScaling(
            "llama3", float(scaling["factor"]), float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )  # fmt: skip
    elif kind == "yarn":
        context = scaling.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        slow, fast = scaling.get("beta_slow") or 1, scaling.get("beta_fast") or 32
        found = RotaryScaling(
            "yarn", float(scaling["factor"]), float(slow), float(fast), int(context),
            bool(scaling.get("truncate", True)), _yarn_attention_factor(scaling),
        )  # fmt: skip
    elif kind == "each":  # Not Hugging Face's: `gguf_model.py` says it so.
        found = RotaryScaling("each", divisors=tuple(scaling["divisors"]))
    else:
        raise ValueError(
            f"The config scales its rotary positions by {kind!r}; supported are linear, llama3, yarn and dynamic."
        )
    return {"rotary_base": float(base), "rotary_scaling": found}


def _yarn_attention_factor(scaling: Fields) -> float:
    """YaRN's growth of queries and keys: as it is given, or 0.1 ln(factor) + 1 (DeepSeek's configs: a ratio of two)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def growth(share: float) -> float:
        return 0.1 * share * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return growth(scaling["mscale"]) / growth(scaling["mscale_all_dim"])
    return growth(1.0)


def _local_layers(fields: Fields, is_local: Callable[[int], bool]) -> tuple[bool, ...]:
    types = fields.get("layer_types")
    if types is not None:
        unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
        if unknown:
            raise ValueError(
                f"The config's layer_types hold {', '.join(unknown)}; supported are full_attention and "
                "sliding_attention."
            )
        return tuple(each == "sliding_attention" for each in types)
    return tuple(is_local(layer) for layer in range(fields["num_hidden_layers"]))


def _llama(fields: Fields, **more: Any) -> TransformerConfig:
    """Llama, and what the families after it have in common with it."""
    tables = fields.get("rope_parameters") or {}
    for table in (fields, tables, *(each for each in tables.values() if isinstance(each, dict))):
        _refuse(table, partial_rotary_factor=1.0)
    n_heads = fields["num_attention_heads"]
    common: dict[str, Any] = {
        "vocab_size": fields["vocab_size"], "d_model": fields["hidden_size"], "n_layers": fields["num_hidden_layers"],
        "n_heads": n_heads, "n_kv_heads": fields.get("num_key_value_heads") or n_heads,
        "d_head": fields.get("head_dim") or fields["hidden_size"] // n_heads, "d_mlp": fields["intermediate_size"],
        "context": fields["max_position_embeddings"], "norm_epsilon": fields["rms_norm_eps"],
        "activation": _activation(fields.get("hidden_activation") or fields.get("hidden_act", "silu")),
        "tied_embeddings": fields.get("tie_word_embeddings", False), **_rotary(fields),
    }  # fmt: skip
    return TransformerConfig(**(common | more))


def _llama_itself(fields: Fields) -> TransformerConfig:
    has_bias = bool(fields.get("attention_bias"))
    return _llama(fields, qkv_bias=has_bias, attn_out_bias=has_bias, mlp_bias=bool(fields.get("mlp_bias")))


def _mistral(fields: Fields) -> TransformerConfig:
    return _llama(fields, window=fields.get("sliding_window", 4096))


def _qwen(fields: Fields, **more: Any) -> TransformerConfig:
    window = fields.get("sliding_window", 4096)
    if not fields.get("use_sliding_window") or window is None:
        return _llama(fields, **more)
    first = fields.get("max_window_layers", 28)
    return _llama(fields, window=window, local_layers=_local_layers(fields, lambda i: i >= first), **more)


def _qwen2(fields: Fields) -> TransformerConfig:
    return _qwen(fields, qkv_bias=True)


def _qwen3(fields: Fields) -> TransformerConfig:
    has_bias = bool(fields.get("attention_bias"))
    return _qwen(fields, qk_norm=True, qkv_bias=has_bias, attn_out_bias=has_bias)


def _gemma(fields: Fields, **more: Any) -> TransformerConfig:
    has_bias = bool(fields.get("attention_bias"))
    activation = fields.get("hidden_activation") or "gelu_pytorch_tanh"
    if fields["model_type"] == "gemma" and _is_since(fields, 4, 48):
        # Before that, `hidden_act` was ignored: Gemma 1's files say "gelu" there and mean the tanh form.
        activation = fields.get("hidden_act", activation)
    settings: dict[str, Any] = {
        "norm_offset": 1.0, "embed_scale": math.sqrt(fields["hidden_size"]), "activation": _activation(activation),
        "tied_embeddings": fields.get("tie_word_embeddings", True), "qkv_bias": has_bias, "attn_out_bias": has_bias,
    }  # fmt: skip
    return _llama(fields, **(settings | more))


def _is_since(fields: Fields, *version: int) -> bool:
    """Whether a version of `transformers` or a later one wrote the config. None wrote one that does not say so."""
    found = re.match(r"(\d+)\.(\d+)", str(fields.get("transformers_version", "")))
    return found is not None and (int(found[1]), int(found[2])) >= version


def _gemma2(fields: Fields, **more: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "post_norms": True, "attn_scale": fields["query_pre_attn_scalar"] ** -0.5, "window": fields["sliding_window"],
        "attn_soft_cap": fields.get("attn_logit_softcapping", 50.0),
        "logit_soft_cap": fields.get("final_logit_softcapping", 30.0),
        "local_layers": _local_layers(fields, lambda layer: layer % 2 == 0),
    }  # fmt: skip
    return _gemma(fields, **(settings | more))


# What the authors' files of the models with vision leave out, for it is the default of the family.
_GEMMA_3_DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": None,
}  # fmt: skip


def _gemma3(fields: Fields) -> TransformerConfig:
    fields = _GEMMA_3_DEFAULTS | dict(fields)
    _refuse(fields, use_bidirectional_attention=False)
    pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    local_base = fields.get("rope_local_base_freq", 10000.0)
    if isinstance(fields.get("rope_parameters"), dict):
        local = _rotary(fields, "sliding_attention", local_base)
        local_base = local["rotary_base"]
        if local["rotary_scaling"] is not None:
            raise ValueError(
                f"The config scales the rotary positions of sliding_attention, {fields['rope_parameters']}; only those "
                "of full_attention can be."
            )
    return _gemma2(
        fields, attn_soft_cap=None,  # There is a field for it, which `transformers` does not use.
        qk_norm=True, rotary_base_local=float(local_base), **_rotary(fields, default_base=1e6),
        local_layers=_local_layers(fields, lambda layer: (layer + 1) % pattern != 0),
    )  # fmt: skip


def _gpt2(fields: Fields) -> TransformerConfig:
    _refuse(fields, add_cross_attention=False)
    d_model, n_heads = fields["n_embd"], fields["n_head"]
    return TransformerConfig(
        vocab_size=fields["vocab_size"], d_model=d_model, n_layers=fields["n_layer"], n_heads=n_heads,
        n_kv_heads=n_heads, d_head=d_model // n_heads, d_mlp=fields.get("n_inner") or 4 * d_model,
        context=fields["n_positions"], norm="layer", norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        activation=_activation(fields.get("activation_function", "gelu_new")), gated_mlp=False, positions="learned",
        qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_embeddings=fields.get("tie_word_embeddings", True),
        attn_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        attn_scale_falls=bool(fields.get("scale_attn_by_inverse_layer_idx", False)),
    )  # fmt: skip


def _gpt_neo(fields: Fields) -> TransformerConfig:
    d_model, n_heads, n_layers = fields["hidden_size"], fields["num_heads"], fields["num_layers"]
    kinds = fields.get("attention_layers") or [kind for each, n in fields["attention_types"] for kind in each * n]
    is_local = tuple(kind == "local" for kind in kinds)
    return TransformerConfig(
        vocab_size=fields["vocab_size"], d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads,
        d_head=d_model // n_heads, d_mlp=fields.get("intermediate_size") or 4 * d_model,
        context=fields["max_position_embeddings"], norm="layer",
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        activation=_activation(fields.get("activation_function", "gelu_new")), gated_mlp=False, positions="learned",
        window=fields.get("window_size", 256) if any(is_local) else None,
        local_layers=is_local if any(is_local) else None, attn_scale=1.0, attn_out_bias=True, mlp_bias=True,
        tied_embeddings=fields.get("tie_word_embeddings", True),
    )  # fmt: skip


def _gpt_neox(fields: Fields) -> TransformerConfig:
    d_model, n_heads = fields["hidden_size"], fields["num_attention_heads"]
    d_head = d_model // n_heads
    parameters = fields.get("rope_parameters") or {}
    share = fields.get("partial_rotary_factor", fields.get("rotary_pct", parameters.get("partial_rotary_factor", 0.25)))
    has_bias = bool(fields.get("attention_bias", True))
    rotary = _rotary(fields)
    if "rope_theta" not in fields and "rope_theta" not in parameters:
        rotary["rotary_base"] = float(fields.get("rotary_emb_base", 10000.0))
    return TransformerConfig(
        vocab_size=fields["vocab_size"], d_model=d_model, n_layers=fields["num_hidden_layers"], n_heads=n_heads,
        n_kv_heads=n_heads, d_head=d_head, d_mlp=fields["intermediate_size"],
        context=fields["max_position_embeddings"], norm="layer", norm_epsilon=fields.get("layer_norm_eps", 1e-5),
        activation=_activation(fields.get("hidden_act", "gelu")), gated_mlp=False,
        parallel_residual=fields.get("use_parallel_residual", True), rotary_dim=int(d_head * share), **rotary,
        qkv_bias=has_bias, attn_out_bias=has_bias, mlp_bias=True,
        tied_embeddings=fields.get("tie_word_embeddings", False),
    )  # fmt: skip


# ---------------------------------------------------------------- where the tensors are


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return tensor.T


def _into_heads(d_head: int) -> Callable[[np.ndarray], np.ndarray]:
    """[heads * d_head, d_model] to [d_model, heads, d_head]."""
    return lambda tensor: tensor.T.reshape(tensor.shape[1], -1, d_head)


def _out_of_heads(d_head: int) -> Callable[[np.ndarray], np.ndarray]:
    """[d_model, heads * d_head] to [heads, d_head, d_model]."""
    return lambda tensor: tensor.T.reshape(-1, d_head, tensor.shape[0])


def _heads(d_head: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tensor: tensor.reshape(-1, d_head)


def _norm(ours: str, theirs: str, config: TransformerConfig) -> dict[str, Layout]:
    found = {f"{ours}.scale": Layout(f"{theirs}.weight")}
    return found | ({f"{ours}.bias": Layout(f"{theirs}.bias")} if config.norm == "layer" else {})


def _attention(config: TransformerConfig, q: str, k: str, v: str, o: str) -> dict[str, Layout]:
    """Separate projections, each [out, in]."""
    ours, d_head = "blocks.{i}.attn", config.d_head
    found = {f"{ours}.W_o": Layout(f"{o}.weight", _out_of_heads(d_head))}
    for letter, theirs in (("q", q), ("k", k), ("v", v)):
        found[f"{ours}.W_{letter}"] = Layout(f"{theirs}.weight", _into_heads(d_head))
        if config.qkv_bias:
            found[f"{ours}.b_{letter}"] = Layout(f"{theirs}.bias", _heads(d_head))
    if config.attn_out_bias:
        found[f"{ours}.b_o"] = Layout(f"{o}.bias")
    return found


def _mlp(config: TransformerConfig, *, into: str, out: str, gate: str = "", is_conv: bool = False) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for ours, theirs in (("in", into), ("out", out), ("gate", gate)):
        if theirs:
            found[f"blocks.{{i}}.mlp.W_{ours}"] = Layout(f"{theirs}.weight", *([] if is_conv else [_transposed]))
            if config.mlp_bias:
                found[f"blocks.{{i}}.mlp.b_{ours}"] = Layout(f"{theirs}.bias")
    return found


def _llama_tensors(config: TransformerConfig) -> dict[str, Layout]:
    block, ours = "model.layers.{i}", "blocks.{i}"
    after_attention = "post_attention_layernorm"
    found = {
        "W_embed": Layout("model.embed_tokens.weight"),
        "W_unembed": Layout("lm_head.weight", _transposed),
        **_norm("final_norm", "model.norm", config),
        **_norm(f"{ours}.attn_norm", f"{block}.input_layernorm", config),
        **_attention(config, *(f"{block}.self_attn.{each}_proj" for each in "qkvo")),
        **_mlp(
            config, into=f"{block}.mlp.up_proj", out=f"{block}.mlp.down_proj", gate=f"{block}.mlp.gate_proj"
        ),
        f"{ours}.attn.q_norm.scale": Layout(f"{block}.self_attn.q_norm.weight"),
        f"{ours}.attn.k_norm.scale": Layout(f"{block}.self_attn.k_norm.weight"),
    }  # fmt: skip
    if config.post_norms:
        return found | {
            **_norm(f"{ours}.attn_post_norm", f"{block}.{after_attention}", config),
            **_norm(f"{ours}.mlp_norm", f"{block}.pre_feedforward_layernorm", config),
            **_norm(f"{ours}.mlp_post_norm", f"{block}.post_feedforward_layernorm", config),
        }
    return found | _norm(f"{ours}.mlp_norm", f"{block}.{after_attention}", config)


def _gpt2_tensors(config: TransformerConfig) -> dict[str, Layout]:
    block, ours, d_head = "transformer.h.{i}", "blocks.{i}", config.d_head
    found = {
        "W_embed": Layout("transformer.wte.weight"),
        "W_pos": Layout("transformer.wpe.weight"),
        "W_unembed": Layout("lm_head.weight", _transposed),
        **_norm("final_norm", "transformer.ln_f", config),
        **_norm(f"{ours}.attn_norm", f"{block}.ln_1", config),
        **_norm(f"{ours}.mlp_norm", f"{block}.ln_2", config),
        f"{ours}.attn.W_o": Layout(f"{block}.attn.c_proj.weight", lambda t: t.reshape(-1, d_head, t.shape[1])),
        f"{ours}.attn.b_o": Layout(f"{block}.attn.c_proj.bias"),
        **_mlp(config, into=f"{block}.mlp.c_fc", out=f"{block}.mlp.c_proj", is_conv=True),
    }
    for at, letter in enumerate("qkv"):
        # [d_model, 3 * d_model]: queries of all heads, keys of all heads, values of all heads.
        found[f"{ours}.attn.W_{letter}"] = Layout(
            f"{block}.attn.c_attn.weight", lambda t, at=at: t.reshape(t.shape[0], 3, -1, d_head)[:, at]
        )
        found[f"{ours}.attn.b_{letter}"] = Layout(
            f"{block}.attn.c_attn.bias", lambda t, at=at: t.reshape(3, -1, d_head)[at]
        )
    return found


def _gpt_neo_tensors(config: TransformerConfig) -> dict[str, Layout]:
    block, ours = "transformer.h.{i}", "blocks.{i}"
    attention = f"{block}.attn.attention"
    return {
        "W_embed": Layout("transformer.wte.weight"),
        "W_pos": Layout("transformer.wpe.weight"),
        "W_unembed": Layout("lm_head.weight", _transposed),
        **_norm("final_norm", "transformer.ln_f", config),
        **_norm(f"{ours}.attn_norm", f"{block}.ln_1", config),
        **_norm(f"{ours}.mlp_norm", f"{block}.ln_2", config),
        **_attention(config, *(f"{attention}.{each}_proj" for each in ("q", "k", "v", "out"))),
        **_mlp(config, into=f"{block}.mlp.c_fc", out=f"{block}.mlp.c_proj"),
    }


def _gpt_neox_tensors(config: TransformerConfig) -> dict[str, Layout]:
    block, ours, d_head = "gpt_neox.layers.{i}", "blocks.{i}", config.d_head
    attention = f"{block}.attention"
    found = {
        "W_embed": Layout("gpt_neox.embed_in.weight"),
        "W_unembed": Layout("embed_out.weight", _transposed),
        **_norm("final_norm", "gpt_neox.final_layer_norm", config),
        **_norm(f"{ours}.attn_norm", f"{block}.input_layernorm", config),
        **_norm(f"{ours}.mlp_norm", f"{block}.post_attention_layernorm", config),
        f"{ours}.attn.W_o": Layout(f"{attention}.dense.weight", _out_of_heads(d_head)),
        f"{ours}.attn.b_o": Layout(f"{attention}.dense.bias"),
        **_mlp(config, into=f"{block}.mlp.dense_h_to_4h", out=f"{block}.mlp.dense_4h_to_h"),
    }
    for at, letter in enumerate("qkv"):
        # [heads * 3 * d_head, d_model]: head by head its query, its key, its value.
        found[f"{ours}.attn.W_{letter}"] = Layout(
            f"{attention}.query_key_value.weight",
            lambda t, at=at: t.T.reshape(t.shape[1], -1, 3, d_head)[:, :, at],
        )
        found[f"{ours}.attn.b_{letter}"] = Layout(
            f"{attention}.query_key_value.bias", lambda t, at=at: t.reshape(-1, 3, d_head)[:, at]
        )
    return found


FAMILIES: dict[str, tuple[Callable[[Fields], TransformerConfig], Callable[[TransformerConfig], dict[str, Layout]]]] = {
    "gpt2": (_gpt2, _gpt2_tensors),
    "gpt_neo": (_gpt_neo, _gpt_neo_tensors),
    "gpt_neox": (_gpt_neox, _gpt_neox_tensors),
    "llama": (_llama_itself, _llama_tensors),
    "mistral": (_mistral, _llama_tensors),
    "qwen2": (_qwen2, _llama_tensors),
    "qwen3": (_qwen3, _llama_tensors),
    "gemma": (_gemma, _llama_tensors),
    "gemma2": (_gemma2, _llama_tensors),
    "gemma3_text": (_gemma3, _llama_tensors),
    "gemma3": (_gemma3, _llama_tensors),
}
"""By `model_type`: from its config to ours, and from our config to where each of our parameters is."""


# ---------------------------------------------------------------- files


def _full_name(name: str, family: str | None) -> str:
    """The name that a tensor has in the whole language model: some checkpoints were saved from a part of it."""
    for prefix in ("language_model.", "model.language_model."):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    if name.startswith(("h.", "wte.", "wpe.", "ln_f.")):
        return f"transformer.{name}"
    if name.startswith(("layers.", "embed_tokens.", "norm.", "embed_in.", "final_layer_norm.")):
        return f"gpt_neox.{name}" if family == "gpt_neox" else f"model.{name}"
    return name


def load_hugging_face(directory: str | Path, **options: Unpack[LoadOptions]) -> Transformer:
    """A model from a directory as Hugging Face lays it out.

    Args:
        directory: Holds `config.json` and safetensors.
        **options: See `LoadOptions`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The family is unknown, the config asks for what is not supported, or the tensors are not those of
            the config; missing and unknown ones are listed.
    """
    return assemble(open_hugging_face(directory), **options)


def open_hugging_face(directory: str | Path) -> OpenedModel:
    """The same without reading a tensor.

    Args:
        directory: Holds `config.json` and safetensors.

    Returns:
        The opened files.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The family is unknown, or the config asks for what is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a model is a directory with config.json and safetensors.")
    whole = read_json(path)
    config_from_hugging_face(whole)  # its faults first: looking through the tensors may take long
    full_name = functools.partial(_full_name, family=whole.get("model_type"))
    return opened_tensors(SafetensorsFolder(directory, full_name=full_name), whole)


def opened_tensors(source: TensorSource, fields: Fields) -> OpenedModel:
    """Tensors that are named and laid out as on Hugging Face, wherever they come from.

    Args:
        source: The tensors.
        fields: The contents of a config.json.

    Returns:
        The opened model.

    Raises:
        ValueError: As for `open_hugging_face`.
    """
    text = _text_part(fields)
    config = config_from_hugging_face(text)
    ignored = _BUFFERS + ((r"^lm_head\.weight$", r"^embed_out\.weight$") if config.tied_embeddings else ())
    if text is not fields:
        ignored += (r"^vision_tower\.", r"^multi_modal_projector\.", r"^model\.(vision_tower|multi_modal_projector)\.")
    return OpenedModel(source, config, _family(text)[1](config), ignored)
