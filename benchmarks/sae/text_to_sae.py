"""From text to a trained autoencoder on SmolLM2's middle layer, beside SAELens' own runner.

    python -m benchmarks.sae.text_to_sae [--tokens 500000 --d-sae 9216 --k 32 --batch 4096]

Both start with the same documents as text, tokenise them, run the model up to the layer, mix the activations, train a
TopK autoencoder once through, and write it; both with the model loaded and nothing compiled. Ours keeps the activations
on disk, as `interp-jax sae train` does, and reads them shuffled; SAELens has a buffer in memory. Once each: it takes
minutes. What the time goes to is told by two rows more.
"""

import argparse
import json
import pathlib
import tempfile
import time

import interp_jax as ij
from benchmarks.instrument.rows import Row, report
from benchmarks.peer_process import PeerProcess, peer_python
from benchmarks.smollm2_folder import write_smollm2
from interp_jax.activations.model_and_rows import BATCH_ROWS, documents_of
from interp_jax.activations.prefetch import PrefetchedSteps
from interp_jax.activations.store_activations import store_activations
from interp_jax.activations.tokens import pack
from interp_jax.models.language_model import LanguageModel
from interp_jax.sae import TrainConfig, save_sae, train

CONTEXT = 128


def ours(model: LanguageModel, documents: list[str], sizes: argparse.Namespace, folder: pathlib.Path) -> list[float]:
    """Seconds from text to a written autoencoder; of them those of the model, and those spent waiting for data."""
    start = time.perf_counter()
    layer = model.layer_or_middle(None)
    rows = pack(documents, model.tokenizer, CONTEXT)
    n_rows = sizes.tokens // CONTEXT // BATCH_ROWS * BATCH_ROWS
    store = store_activations(
        model, rows[:n_rows], folder / "activations", site="resid_post", layer=layer, batch_rows=BATCH_ROWS
    )
    stored = time.perf_counter() - start
    config = TrainConfig(store.d_in, sizes.d_sae, "topk", k=sizes.k, n_steps=sizes.tokens // sizes.batch)
    with PrefetchedSteps(store.shuffled(sizes.batch, seed=0), 2) as batches:
        sae, _ = train(config, batches)
    save_sae(sae, folder / "sae", model_name=model.name, hook_name=f"resid_post.{layer}")
    return [time.perf_counter() - start, stored, batches.waited_s]


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 500_000), ("d-sae", 9216), ("batch", 4096), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model-dtype", default="float32", help="of the model on both sides; bfloat16 is the other")
    parser.add_argument("--peer-python", help="interpreter of the peer, where it shares an environment with ours")
    sizes = parser.parse_args()
    documents = documents_of("wikipedia")
    model = ij.load("smollm2", dtype=sizes.model_dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_smollm2(folder)
        (folder / "documents.json").write_text(json.dumps(documents))
        peer = PeerProcess(peer_python("saelens", sizes.peer_python), "benchmarks.sae.saelens_runner_peer", str(folder))
        try:
            layer = model.layer_or_middle(None)
            asked = layer, sizes.d_sae, sizes.k, sizes.tokens, sizes.batch, CONTEXT, sizes.model_dtype
            theirs = peer.ask("train", *asked)
        finally:
            peer.close()
        total, stored, waited = ours(model, documents, sizes, folder)
    rows = [
        Row(f"text to a trained autoencoder, {sizes.tokens:,} tokens / SAELens' runner", "s", total, theirs, 1 / 2),
        Row("tokens to activations on disk / the whole", "s", stored, total),
        Row("waiting for data / training", "s", waited, total - stored, 0.05),
    ]
    report("text_to_sae", rows, **{name: value for name, value in vars(sizes).items() if name != "peer_python"})


if __name__ == "__main__":
    main()
