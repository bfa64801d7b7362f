"""Attribution on SmolLM2-135M: what it costs in passes, and patching beside nnsight and plain PyTorch.

    make bench-attribution, or: python -m benchmarks.attribution, where the extras `demo` and `peers` are installed

f32, 64 tokens, one pair of prompts that differ in two tokens. Sides of a row are run in turn, and times are medians. A
backward pass is what a gradient with respect to the embedding takes beyond a forward pass. Patching is timed by the
node, over one batch of `resid_post` nodes: ours as the sweep runs it; nnsight with a trace a node, as its own examples
do; plain PyTorch with the nodes of a layer as rows of one batch under a hook.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import interp_jax as ij
from benchmarks.attribution.pytorch_peer import Peer
from benchmarks.instrument.rows import Row, memory_analysis, report, seconds
from interp_jax.attribution import LogitDifference, Nodes, Patching, PromptPair, atp, atp_star
from interp_jax.attribution.atp import _atp
from interp_jax.attribution.atp_star import _ADDED, _atp_star
from interp_jax.attribution.measured_pass import measured_pass
from interp_jax.attribution.metric import metric_of
from interp_jax.attribution.nodes import every_stream_site, resolve
from interp_jax.models.language_model import LanguageModel

SEQ, ANSWER, WRONG = 64, 260, 284
LAYER = 12
N_NODES = 48
DROP_ROUNDS, DROP_PASSES = 3, 5
"""Rounds in which GradDrop is timed, and forward and backward passes beside it in each."""


def make_pair(model: LanguageModel) -> PromptPair:
    """Random tokens, two of which differ."""
    clean = np.random.default_rng(0).integers(100, model.vocab_size, SEQ)
    corrupted = clean.copy()
    corrupted[[10, 40]] = 345, 678
    labels = tuple(map(str, clean)), tuple(map(str, corrupted))
    return PromptPair(clean, corrupted, ANSWER, WRONG, *labels)


def pass_rows(model: LanguageModel, pair: PromptPair, rounds: int) -> Iterator[Row]:
    """AtP, the QK fix and GradDrop in passes."""
    everything = every_stream_site(model, SEQ)
    tokens = jnp.asarray(pair.clean, jnp.int32)[None]
    forward = jax.jit(model.forward)

    @jax.jit
    def gradient(params: Any, tokens: Any) -> Any:
        metric = LogitDifference(ANSWER, WRONG)
        return ij.gradients(model.forward, "embed", objective=lambda logits: metric(logits)[0])(params, tokens)[1]

    queries_and_keys = [Nodes("q"), Nodes("k")]
    of_forward, of_atp, of_fix = seconds(
        [
            lambda: forward(model.params, tokens),
            lambda: atp(model, pair, everything),
            lambda: atp_star(model, pair, queries_and_keys, grad_drop=False),
        ],
        rounds,
    )
    yield Row("AtP, all sites, layers and positions / a forward pass", "s", of_atp, of_forward, 4.0)
    yield Row("QK fix, all heads and positions / that AtP", "s", of_fix, of_atp, 3.0)
    # In turn with many passes, as a difference of two times that were measured minutes before would be of another state
    # of the machine.
    passes = [lambda: forward(model.params, tokens), lambda: gradient(model.params, tokens)]
    of_drop, *each = seconds(
        [lambda: atp_star(model, pair, everything, qk_fix=False), *passes * DROP_PASSES], DROP_ROUNDS
    )
    backward = float(np.median(each[1::2]) - np.median(each[::2]))
    yield Row("GradDrop, all sites, layers and positions / a backward pass", "s", of_drop, backward, model.n_layers + 1)
    yield Row("GradDrop / AtP", "s", of_drop, of_atp)

    families = resolve(model, everything, SEQ)
    dropped = resolve(model, [Nodes(site, by=()) for site in _ADDED], SEQ)
    both = jnp.asarray(np.stack([pair.clean, pair.corrupted]), jnp.int32)
    run = measured_pass(model, families, metric_of(None, pair, model.vocab_size))
    program: Any = _atp
    once = program.lower(run.forward, families, run.params, run.metric, both).compile()
    program = _atp_star
    dropping = program.lower(run.forward, families, (), dropped, run.params, run.metric, both).compile()
    of_dropping, of_once = (float(memory_analysis(each).temp_size_in_bytes) for each in (dropping, once))
    yield Row("memory of GradDrop / of AtP, one backward pass", "B", of_dropping, of_once, 1.1)


def patching_rows(model: LanguageModel, pair: PromptPair, rounds: int) -> Iterator[Row]:
    """A node's time beside the peers', and the memory beside the budget."""
    budget = 2**30
    patching = Patching(model, pair, Nodes("resid_post"), memory_budget=budget)
    n_nodes = min(N_NODES, patching.rows)
    numbers = LAYER * SEQ + np.arange(n_nodes)
    peer = Peer(pair)
    try:
        expected = peer.effects("nnsight", LAYER, 2, n_nodes)
        np.testing.assert_allclose(patching.of_nodes(numbers[:2]), expected, atol=1e-3)
        np.testing.assert_allclose(
            patching.of_nodes(numbers), peer.effects("hooks", LAYER, n_nodes, n_nodes), atol=1e-3
        )
        ours, nnsight, hooks = seconds(
            [
                lambda: patching.of_nodes(LAYER * SEQ + np.arange(patching.rows)),
                lambda: peer.effects("nnsight", LAYER, 12, n_nodes),
                lambda: peer.effects("hooks", LAYER, n_nodes, n_nodes),
            ],
            rounds,
        )
    finally:
        peer.close()
    of_node = ours / patching.rows
    yield Row("patching, a node / nnsight", "s", of_node, nnsight / 12, 0.5)
    yield Row("patching, a node / PyTorch hooks in one batch", "s", of_node, hooks / n_nodes)
    yield Row("memory of patching / its budget", "B", float(patching._needed(patching.rows)), float(budget), 1.0)


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--only", choices=("passes", "patching"), help="this part of the table; both when left out")
    options = parser.parse_args()
    model = ij.load("smollm2")
    pair = make_pair(model)
    rows: list[Row] = []
    if options.only != "patching":
        rows += pass_rows(model, pair, options.rounds)
    if options.only != "passes":
        rows += patching_rows(model, pair, options.rounds)
    report("attribution", rows, tokens=SEQ)


if __name__ == "__main__":
    main()
