"""SmolLM2-135M in the project's `Transformer`, beside PyTorch's `transformers` and beside the patched Flax Llama.

    make bench-models, or: python -m benchmarks.models, where the extras `demo` and `peers` are installed

One process, f32, the same weights from one GGUF file; each row's two sides are run in turn, and times are medians.
PyTorch has as many threads as the machine has cores.
"""

import argparse
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from benchmarks.instrument.rows import Row, report, seconds
from interp_jax import installed_data
from interp_jax.models.flax_llama import load_smollm2
from interp_jax.models.gguf_model import GgufCheckpoint, load_gguf
from interp_jax.models.transformer import Transformer, apply, unrolled

torch: Any = importlib.import_module("torch")  # There only where this is run.

NEW_TOKENS = 128
LAYER = 15


def pytorch_model(checkpoint: GgufCheckpoint) -> Any:
    """The same weights in `transformers` on PyTorch."""
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(os.cpu_count() or 1)
    fields = {key: value for key, value in checkpoint.fields.items() if key != "model_type" and value is not None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    state = {name: torch.tensor(checkpoint.tensor(name)) for name in checkpoint.names}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def forward_rows(model: Transformer, torch_model: Any, rounds: int) -> list[Row]:
    """A pass with logits over 8 rows of 128 tokens."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 128))
    library = load_smollm2()
    ours, flax = jax.jit(apply), jax.jit(library.forward)
    loop = unrolled(model)
    row, torch_row = jnp.asarray(tokens), torch.tensor(tokens)
    with torch.no_grad():
        expected = torch_model(torch_row).logits.numpy()
        np.testing.assert_allclose(ours(model, row), expected, atol=5e-4)
        np.testing.assert_allclose(ours(loop, row), expected, atol=5e-4)
        sides = [
            lambda: ours(loop, row),
            lambda: ours(model, row),
            lambda: flax(library.params, row),
            lambda: torch_model(torch_row).logits,
        ]
        of_loop, stacked, flax_seconds, torch_seconds = seconds(sides, rounds)
    return [
        Row("forward with logits, 8 x 128, unrolled / PyTorch", "s", of_loop, torch_seconds, 1 / 1.8),
        Row("forward with logits, 8 x 128, stacked / PyTorch", "s", stacked, torch_seconds, 1 / 1.8),
        Row("forward with logits, 8 x 128, unrolled / Flax Llama", "s", of_loop, flax_seconds, 1.0),
        Row("forward with logits, 8 x 128, stacked / Flax Llama", "s", stacked, flax_seconds, 1.0),
    ]


def damped(activation: ij.Activation) -> Any:
    """An intervention at one layer."""
    if (activation.layer, activation.name) == (LAYER, "mlp_out"):
        return activation.value * 0.9
    return None


def decode_rows(model: Transformer, torch_model: Any, rounds: int) -> list[Row]:
    """128 new tokens, the likeliest each."""
    loop = unrolled(model)
    found: list[Row] = []
    for batch, factor in ((1, 1.3), (16, 1.8)):
        prompts = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, 16))
        torch_prompts = torch.tensor(prompts)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(torch_prompts), "max_new_tokens": NEW_TOKENS, "do_sample": False,
            "min_new_tokens": NEW_TOKENS, "pad_token_id": 0,
        }  # fmt: skip

        def ours(model: Transformer = loop, prompts: Any = prompts, **more: Any) -> Any:
            return ij.generate(model, prompts.tolist(), max_new_tokens=NEW_TOKENS, **more).tokens

        sides = [
            ours,
            lambda ours=ours: ours(model),
            lambda ours=ours: ours(interventions=damped),
            lambda torch_prompts=torch_prompts, options=options: torch_model.generate(torch_prompts, **options),
        ]
        plain, stacked, edited, of_torch = seconds(sides, rounds)
        what = f"decode, batch {batch}, {NEW_TOKENS} tokens"
        found += [
            Row(f"{what}, unrolled / PyTorch", "s", plain, of_torch, 1 / factor),
            Row(f"{what}, stacked / PyTorch", "s", stacked, of_torch, 1 / factor),
            Row(f"{what}, one layer edited / without", "s", edited, plain, 1.05),
        ]
    return found


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    rounds = parser.parse_args().rounds
    checkpoint = GgufCheckpoint(installed_data.find("smollm2"))
    model, torch_model = load_gguf(checkpoint.file), pytorch_model(checkpoint)
    report("models", [*forward_rows(model, torch_model, rounds), *decode_rows(model, torch_model, rounds)])


if __name__ == "__main__":
    main()
