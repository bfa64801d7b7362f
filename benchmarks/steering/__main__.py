"""Steering SmolLM2-135M: beside decoding as it is, and beside repeng (PyTorch) on the same work.

    make bench-steering, or: python -m benchmarks.steering

f32, the same weights from one GGUF file. The two sides of a row are run in turn, and times are medians. The peer has
an environment and a process of its own, and as many threads as the machine has cores.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import interp_jax as ij
from benchmarks.instrument.rows import Row, report, seconds
from benchmarks.peer_process import PeerProcess, peer_python
from benchmarks.smollm2_folder import write_smollm2
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.transformer import Transformer, unrolled
from interp_jax.steering import SteeringVector, roll_out, steer

LAYER, NORM = 15, 60.0
SAME = 8
"""First new tokens in which the two sides must agree; further on rounding may decide."""


def vector_of(model: LanguageModel) -> SteeringVector:
    """Any direction: what it says does not matter for the time."""
    direction = np.random.default_rng(0).normal(size=model.d_model).astype(np.float32)
    return SteeringVector(direction, LAYER).to_norm(NORM)


def decode_rows(model: LanguageModel, rounds: int, n_tokens: int) -> Iterator[Row]:
    """A steered continuation beside a plain one, of the same ids."""
    vector, prompt = vector_of(model), list(range(100, 116))
    for batch in (1, 16):
        coefficients = [1.0] * batch

        def plain(batch: int = batch) -> Any:
            return ij.generate(model, [prompt] * batch, max_new_tokens=n_tokens, stop_tokens=()).tokens

        def steered(coefficients: list[float] = coefficients) -> Any:
            return steer(model, prompt, vector, coefficients=coefficients, max_new_tokens=n_tokens)

        ours, other = seconds([steered, plain], rounds)
        yield Row(f"decode, batch {batch}, {n_tokens} tokens, steered / plain", "s", ours, other, 1.05)


def sweep_rows(model: LanguageModel, rounds: int) -> Iterator[Row]:
    """16 coefficients, 8 seeds, 40 tokens: one program, beside as many plain tokens."""
    prompt, vector = "I went up to my friend and said", vector_of(model)
    ids = [model.tokenizer.end_of_text_id or 0, *model.tokenizer.encode(prompt)]

    def sweep() -> Any:
        return roll_out(
            model, prompt, vector, coefficients=np.linspace(0, 2, 16).tolist(), n_seeds=8, key=jax.random.key(0),
            max_new_tokens=40,
        )  # fmt: skip

    def plain() -> Any:
        key = jax.random.key(0)
        return ij.generate(model, [ids] * 128, max_new_tokens=40, temperature=1.0, key=key).tokens

    ours, other = seconds([sweep, plain], rounds)
    yield Row("sweep of 16 coefficients x 8 seeds x 40 tokens / as many plain tokens", "s", ours, other, 1.2)


def peer_rows(model: LanguageModel, rounds: int, n_tokens: int, python: str) -> Iterator[Row]:
    """Greedy continuations with a vector added at every position, ours beside repeng's; the tokens are compared."""
    vector, prompt = vector_of(model), list(range(100, 116))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_smollm2(folder)
        (folder / "layer.json").write_text(json.dumps(LAYER))
        np.save(folder / "direction.npy", vector.direction)
        peer = PeerProcess(python, "benchmarks.steering.repeng_peer", str(folder))
        try:
            for batch in (1, 16):

                def ours(batch: int = batch, n: int = n_tokens) -> Any:
                    return steer(model, prompt, vector, coefficients=[1.0] * batch, max_new_tokens=n)

                def theirs(batch: int = batch, n: int = n_tokens) -> Any:
                    return peer.ask("decode", [prompt] * batch, n, 1.0)

                texts = [model.tokenizer.decode(row[:SAME]) for row in theirs(batch)]
                same = [one.text.startswith(text) for one, text in zip(ours(batch), texts, strict=True)]
                assert all(same), "the two sides do not do the same work"
                mine, other = seconds([ours, theirs], rounds)
                yield Row(f"steered decode, batch {batch}, {n_tokens} tokens / repeng", "s", mine, other, 0.5)
        finally:
            peer.close()


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    kinds = ["decode", "sweep", "peer"]
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("--peer-python", help="interpreter of the peer, where it shares an environment with ours")
    options = parser.parse_args()
    model = ij.load("smollm2")
    assert isinstance(model.params, Transformer)
    if jax.default_backend() == "cpu":
        # As the benchmark of models has it: on a CPU, layers apart save a copy of the weights a pass.
        model = dataclasses.replace(model, params=unrolled(model.params))
    rows: list[Row] = []
    if "decode" in options.only:
        rows += decode_rows(model, options.rounds, options.tokens)
    if "sweep" in options.only:
        rows += sweep_rows(model, max(1, options.rounds // 2))
    if "peer" in options.only:
        rows += peer_rows(model, options.rounds, options.tokens, peer_python("repeng", options.peer_python))
    report("steering", rows, cores=os.cpu_count(), rounds=options.rounds)


if __name__ == "__main__":
    main()
