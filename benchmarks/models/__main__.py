"""SmolLM2-135M in the project's `Transformer`, beside PyTorch's `transformers` and beside the patched Flax Llama.

    make bench-models, or: python -m benchmarks.models, where the extras `demo` and `peers` are installed

f32 unless a row says otherwise, the same weights from one GGUF file; the two sides of a row are run in turn, and times
are medians. PyTorch has a process of its own and as many threads as the machine has cores.
"""

import argparse
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from benchmarks.instrument.rows import Row, memory_analysis, report, seconds
from benchmarks.models.pytorch_peer import Peer
from interp_jax import installed_data
from interp_jax.models.flax_llama import load_smollm2
from interp_jax.models.gguf_model import load_gguf
from interp_jax.models.transformer import Transformer, apply, unrolled

NEW_TOKENS = 128
LAYER = 15
MATMUL = 2048
FIRST_TOKEN_SECONDS = 10.0

FIRST_TOKEN = """
import interp_jax as ij
model = ij.load("smollm2")
prompt = model.tokenizer.encode("The capital of France is")
print(ij.generate(model, [prompt], max_new_tokens=1).rows())
"""


def matmul_flops(rounds: int) -> float:
    """Floating-point operations a second of a large product, for the share of it that a forward pass reaches."""
    x = jnp.ones((MATMUL, MATMUL))
    product = jax.jit(jnp.matmul)
    return 2 * MATMUL**3 / seconds([lambda: product(x, x)], rounds)[0]


def forward_rows(model: Transformer, tokens: np.ndarray, peer: Peer, rounds: int) -> list[Row]:
    """A pass with logits over 8 rows of 128 tokens."""
    ours, loop, row = jax.jit(apply), unrolled(model), jnp.asarray(tokens)
    with jax.default_matmul_precision("highest"):
        expected = peer.forward()
        close = 5e-5 * float(np.abs(expected).max())  # on two cores 1.5e-4 is seen; on a GPU 6e-4, of 16
        np.testing.assert_allclose(ours(model, row), expected, atol=close)
        np.testing.assert_allclose(ours(loop, row), expected, atol=close)
    sides = [lambda: ours(loop, row), lambda: ours(model, row), peer.run_forward]
    if has_flax_classes():
        library = load_smollm2()
        flax = jax.jit(library.forward)
        sides.append(lambda: flax(library.params, row))
    of_loop, stacked, torch_seconds, *of_flax = seconds(sides, rounds)
    what = f"forward with logits, {tokens.shape[0]} x {tokens.shape[1]}"
    n_weights = sum(leaf.size for leaf in jax.tree.leaves(model))
    products = (
        2 * n_weights * tokens.size / matmul_flops(rounds)
    )  # The embedding is looked up, and multiplied at the end.
    return [
        Row(f"{what}, unrolled / PyTorch", "s", of_loop, torch_seconds, 1 / 1.8),
        Row(f"{what}, stacked / PyTorch", "s", stacked, torch_seconds, 1 / 1.8),
        *(Row(f"{what}, unrolled / Flax Llama", "s", of_loop, flax_seconds, 1.0) for flax_seconds in of_flax),
        *(Row(f"{what}, stacked / Flax Llama", "s", stacked, flax_seconds, 1.0) for flax_seconds in of_flax),
        Row(f"{what}, unrolled / its matmuls at peak", "s", of_loop, products),
        Row(f"{what}, PyTorch / its matmuls at peak", "s", torch_seconds, products),
    ]


def long_rows(model: Transformer, peer: Peer, rounds: int) -> list[Row]:
    """Passes with logits over longer rows, and what memory they take beside those that keep all scores."""
    found: list[Row] = []
    for batch, seq in ((4, 1024), (1, 4096)):
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, seq))
        row = jnp.asarray(tokens)

        def whole(model: Transformer, tokens: Any) -> Any:
            for _ in (running := ij.iterate(apply, sites="attn_probs")(model, tokens)):
                pass
            return running.retval

        sides = [jax.jit(function) for function in (lambda model, tokens: apply(model, tokens), whole)]
        runs = [lambda side=side, row=row: side(model, row) for side in sides]
        ours, of_whole, of_torch = seconds([*runs, lambda tokens=tokens: peer.run_forward(tokens)], rounds)
        memory = [memory_analysis(side.lower(model, row).compile()).temp_size_in_bytes for side in sides]
        what = f"forward with logits, {batch} x {seq}"
        found += [
            Row(f"{what} / PyTorch", "s", ours, of_torch),
            Row(f"{what} / looking at `attn_probs`", "s", ours, of_whole),
            Row(f"{what}: temporary memory / looking at `attn_probs`", "B", *memory),
        ]
    return found


def has_flax_classes() -> bool:
    """Whether the `transformers` that is installed still has them; 4.57.6 was the last."""
    return importlib.util.find_spec("transformers.models.llama.modeling_flax_llama") is not None


def damped(activation: ij.Activation) -> Any:
    """An intervention at one layer."""
    if (activation.layer, activation.name) == (LAYER, "mlp_out"):
        return activation.value * 0.9
    return None


def decode_rows(model: Transformer, peer: Peer, rounds: int) -> list[Row]:
    """128 new tokens, the likeliest each."""
    loop = unrolled(model)
    found: list[Row] = []
    for batch, factor in ((1, 1.3), (16, 1.8)):
        prompts = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, 16))

        def ours(model: Transformer, prompts: Any = prompts, **more: Any) -> Any:
            return ij.generate(model, prompts.tolist(), max_new_tokens=NEW_TOKENS, **more).tokens

        with jax.default_matmul_precision("highest"):
            np.testing.assert_array_equal(ours(loop)[:, :16], peer.continuations(prompts, 16))
        sides = [
            lambda ours=ours: ours(loop),
            lambda ours=ours: ours(loop, interventions=damped),
            lambda ours=ours: ours(model),
            lambda ours=ours: ours(model, interventions=damped),
            lambda prompts=prompts: peer.decode(prompts, NEW_TOKENS),
        ]
        plain, edited, stacked, stacked_edited, of_torch = seconds(sides, rounds)
        what = f"decode, batch {batch}, {NEW_TOKENS} tokens"
        found += [
            Row(f"{what}, unrolled / PyTorch", "s", plain, of_torch, 1 / factor),
            Row(f"{what}, stacked / PyTorch", "s", stacked, of_torch, 1 / factor),
            Row(f"{what}, unrolled, one layer edited / without", "s", edited, plain, 1.05),
            Row(f"{what}, stacked, one layer edited / without", "s", stacked_edited, stacked, 1.05),
        ]
    return found


def bfloat16_rows(model: Transformer, tokens: np.ndarray, peer: Peer, rounds: int) -> list[Row]:
    """Forward passes and decoding in bfloat16 on both sides, and beside ours in float32. The peer stays in it."""
    wide = unrolled(model)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    ours, row = jax.jit(apply), jnp.asarray(tokens)
    exact = np.asarray(ours(wide, row))
    peer.narrow()
    of_ours, of_torch = (np.linalg.norm(logits - exact) for logits in (ours(narrow, row), peer.forward()))
    assert of_ours < 1.5 * of_torch
    timed = seconds([lambda: ours(narrow, row), peer.run_forward, lambda: ours(wide, row)], rounds)
    found = _beside("bfloat16, forward with logits, 8 x 128, unrolled", timed)
    for batch in (1, 16):
        prompts = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, 16))

        def decode(model: Transformer, prompts: Any = prompts) -> Any:
            return ij.generate(model, prompts.tolist(), max_new_tokens=NEW_TOKENS).tokens

        sides = [
            lambda decode=decode: decode(narrow),
            lambda prompts=prompts: peer.decode(prompts, NEW_TOKENS),
            lambda decode=decode: decode(wide),
        ]
        found += _beside(f"bfloat16, decode, batch {batch}, {NEW_TOKENS} tokens, unrolled", seconds(sides, rounds))
    return found


def _beside(what: str, timed: list[float]) -> list[Row]:
    narrow, of_torch, wide = timed
    return [Row(f"{what} / PyTorch", "s", narrow, of_torch), Row(f"{what} / float32", "s", narrow, wide)]


def first_token_rows(rounds: int) -> list[Row]:
    """A new process: import, load, compile (or find it in the compilation cache), run."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

        def run() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST_TOKEN], env=environment, check=True, capture_output=True)
            return time.perf_counter() - start

        cold = run()
        n_files = len(list(pathlib.Path(cache).iterdir()))
        warm = statistics.median([run() for _ in range(rounds)])
        assert len(list(pathlib.Path(cache).iterdir())) == n_files > 0
    return [
        Row("first token of a new process, compilation cache warm / 1 s", "s", warm, 1.0, FIRST_TOKEN_SECONDS),
        Row("first token of a new process, compilation cache empty / warm", "s", cold, warm),
    ]


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    parts = ("forward", "long", "decode", "bfloat16", "first-token")
    parser.add_argument("--only", choices=parts, help="this part of the table; all when left out")
    options = parser.parse_args()
    wanted = parts if options.only is None else (options.only,)
    model = load_gguf(installed_data.find("smollm2"))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 128))
    rows: list[Row] = []
    peer = Peer(tokens)
    try:
        if "forward" in wanted:
            rows += forward_rows(model, tokens, peer, options.rounds)
        if "long" in wanted:
            rows += long_rows(model, peer, min(options.rounds, 2))  # minutes each
        if "decode" in wanted:
            rows += decode_rows(model, peer, options.rounds)
        if "bfloat16" in wanted:  # the peer's last
            rows += bfloat16_rows(model, tokens, peer, options.rounds)
    finally:
        peer.close()
    if "first-token" in wanted:
        rows += first_token_rows(options.rounds)
    report("models", rows, threads=peer.threads)


if __name__ == "__main__":
    main()
