"""SAELens' own runner, from text to a trained autoencoder, in a process of its own.

The model is transformers' Llama with SmolLM2's weights, wrapped as SAELens wraps any model of transformers: a pass
stops at the hooked layer. Nothing is evaluated, logged or checkpointed.
"""

import importlib
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks.peer_process import serve
from benchmarks.pytorch_device import peer_device, wait_for
from benchmarks.pytorch_smollm2 import load_smollm2


def main(folder: pathlib.Path) -> None:
    """Serves `train`, which answers with the seconds that it took.

    Args:
        folder: SmolLM2's, and `documents.json`.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    datasets: Any = importlib.import_module("datasets")
    lens: Any = importlib.import_module("sae_lens")
    proxy: Any = importlib.import_module("sae_lens.load_model").HookedProxyLM
    logging_config: Any = importlib.import_module("sae_lens.config").LoggingConfig

    device = peer_device(torch)
    model = load_smollm2(folder, device)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    documents = json.loads((folder / "documents.json").read_text())

    def train(layer: int, d_sae: int, k: int, n_tokens: int, batch_size: int, context: int, dtype: str) -> float:
        model.to(getattr(torch, dtype))
        hook = f"model.layers.{layer}"
        config = lens.LanguageModelSAERunnerConfig(
            sae=lens.TopKTrainingSAEConfig(d_in=model.config.hidden_size, d_sae=d_sae, k=k, device=device),
            model_name="smollm2",
            model_class_name="AutoModelForCausalLM",
            hook_name=hook,
            dataset_path="documents",
            is_dataset_tokenized=False,
            streaming=False,
            context_size=context,
            prepend_bos=False,
            training_tokens=n_tokens,
            train_batch_size_tokens=batch_size,
            n_batches_in_buffer=2 * batch_size // context,
            lr=1e-3,
            adam_beta1=0.0,
            device=device,
            logger=logging_config(log_to_wandb=False),
            checkpoint_path=None,
            output_path=str(folder / "output"),
            verbose=False,
        )
        data = datasets.Dataset.from_dict({"text": documents})
        start = time.perf_counter()
        # It hooks what it is given: a proxy whose every module is hooked would be slower.
        runner = lens.LanguageModelSAETrainingRunner(
            config, override_dataset=data, override_model=proxy(model, tokenizer, hook_names=[hook])
        )
        runner.run()
        wait_for(torch)
        return time.perf_counter() - start

    serve({"train": train})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
