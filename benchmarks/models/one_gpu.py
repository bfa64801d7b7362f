"""A model of Llama-3-8B's shape on one GPU, beside PyTorch's `transformers` on the same card.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 python -m benchmarks.models.one_gpu, where there are `torch` and `transformers`

bf16, random weights (nothing that is measured depends on them), 8 rows of 1024 tokens; ours stacked. The two sides of a
row are run in turn, each in a process of its own, and times are medians.
"""

import argparse
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from benchmarks.instrument.rows import Row, report, seconds, temp_bytes
from benchmarks.models.large import LLAMA_3_8B, NEW_TOKENS, ROWS, TOKENS
from benchmarks.models.pytorch_peer import likeliest
from benchmarks.peer_process import PeerProcess, serve
from benchmarks.pytorch_device import peer_device, wait_for
from interp_jax.models.transformer import Transformer, apply

LAYER = 16
PROMPT = 64


def random_model() -> Transformer:
    """The model, its weights drawn a kind at a time."""
    shapes = jax.eval_shape(lambda: Transformer(LLAMA_3_8B, jax.random.key(0), dtype=jnp.bfloat16))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def damped(activation: ij.Activation) -> Any:
    """An edit of one layer, in generation."""
    if (activation.layer, activation.name) == (LAYER, "mlp_out"):
        return activation.value * 0.9
    return None


def damp(model: Transformer, tokens: Any) -> Any:
    """An edit of every layer, in a pass."""
    for _, _, value in (running := ij.iterate(apply, sites="mlp_out")(model, tokens)):
        running.modified_value = value * jnp.asarray(0.9, value.dtype)
    return running.retval


def forward_rows(model: Transformer, peer: PeerProcess, rounds: int) -> list[Row]:
    """Passes with logits."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, LLAMA_3_8B.vocab_size, (ROWS, TOKENS)))

    def plain(model: Transformer, tokens: Any) -> Any:
        return apply(model, tokens)

    fetched = ij.fetch(apply, layers=LAYER)
    programs = [jax.jit(function) for function in (plain, fetched, damp)]
    sides = [lambda program=program: program(model, tokens) for program in programs]
    ours, of_fetched, of_damped, of_torch = seconds([*sides, lambda: peer.ask("forward", tokens.tolist())], rounds)
    what = f"forward with logits, {ROWS} x {TOKENS}"
    memory = [temp_bytes(each, model, tokens) for each in (damp, plain)]
    return [
        Row(f"{what} / PyTorch", "s", ours, of_torch),
        Row(f"{what}, all sites of layer {LAYER} fetched / without", "s", of_fetched, ours),
        Row(f"{what}, `mlp_out` of every layer edited / without", "s", of_damped, ours),
        Row(f"{what}, edited: temporary memory / without", "B", *memory),
    ]


def decode_rows(model: Transformer, peer: PeerProcess, rounds: int) -> list[Row]:
    """The likeliest tokens."""
    found: list[Row] = []
    for batch in (1, 16):
        prompts = np.random.default_rng(1).integers(0, LLAMA_3_8B.vocab_size, (batch, PROMPT)).tolist()

        def ours(prompts: Any = prompts, **more: Any) -> Any:
            return ij.generate(model, prompts, max_new_tokens=NEW_TOKENS, **more).tokens

        sides = [
            ours,
            lambda ours=ours: ours(interventions=damped),
            lambda prompts=prompts: peer.ask("decode", prompts),
            lambda prompts=prompts: peer.ask("decode with a hook", prompts),
        ]
        plain, edited, of_torch, of_hook = seconds(sides, rounds)
        what = f"decode, batch {batch}, {NEW_TOKENS} tokens"
        found += [
            Row(f"{what} / PyTorch", "s", plain, of_torch),
            Row(f"{what}, one layer edited / PyTorch with a hook", "s", edited, of_hook),
            Row(f"{what}, one layer edited / without", "s", edited, plain, 1.05),
        ]
    return found


def _serve() -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    device, c = peer_device(torch), LLAMA_3_8B
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.d_mlp, max_position_embeddings=c.context,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()

    def decode(prompts: list[list[int]]) -> None:
        likeliest(torch, model, prompts, NEW_TOKENS)

    def decode_with_a_hook(prompts: list[list[int]]) -> None:
        handle = model.model.layers[LAYER].mlp.register_forward_hook(lambda module, args, out: out * 0.9)
        decode(prompts)
        handle.remove()

    def forward(tokens: list[list[int]]) -> None:
        model(torch.tensor(tokens, device=device))
        wait_for(torch)

    with torch.no_grad():
        serve({"decode": decode, "decode with a hook": decode_with_a_hook, "forward": forward})


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        _serve()
        return
    model = random_model()
    peer = PeerProcess(sys.executable, "benchmarks.models.one_gpu", "--peer")
    try:
        rows = forward_rows(model, peer, options.rounds) + decode_rows(model, peer, options.rounds)
    finally:
        peer.close()
    report("models_one_gpu", rows)


if __name__ == "__main__":
    main()
