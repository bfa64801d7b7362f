"""What PyTorch's `transformers` computes with the two models that install by name: written once, compared ever after.

`python tests/models/pytorch_real_models.py`, where PyTorch and accelerate are installed beside the weights (extra
`peers`; `interp-jax data get`), writes `pytorch_real_models.npz`. The weights are read by `transformers`' own GGUF
reader: nothing of ours is between the file and its logits. (Its tokenizers from GGUF give other ids than the models
were trained with, so the ids are ours; `test_tokenizer.py` compares those.) Of the logits, those of some tokens are
stored, and their logsumexp; of the continuations, also by how much each token led the next one, for two programs may
differ where it led by no more than rounding.
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_suffix(".npz")
TEXTS = (
    "The old lighthouse stood at the end of the pier, and every evening since 1889 its keeper would climb "
    "the stairs to",
    "There was once a king who",
    "def fibonacci(n):\n    ",
)
NEW_TOKENS = 64
NAMES = ("smollm2", "gemma3")


def stored_tokens(vocab_size: int) -> np.ndarray:
    """Whose logits are stored."""
    return np.sort(np.random.default_rng(5).choice(vocab_size, 200, replace=False))


def main() -> None:
    """Writes the file."""
    import torch
    import transformers

    from interp_jax.models.from_files import read_tokenizer
    from interp_jax.models.known import path_of

    found: dict[str, np.ndarray] = {}
    for name in NAMES:
        path = path_of(name)
        options = {"gguf_file": path.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
        tokenizer, _ = read_tokenizer(path)
        for number, text in enumerate(TEXTS):
            ids = tokenizer.encode(text)
            ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].numpy()
                generated = model.generate(
                    torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                    output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip
            best = [np.sort(score[0].numpy())[-2:] for score in generated.scores]
            at = f"{name}/{number}"
            found[f"{at}/ids"] = np.asarray(ids)
            found[f"{at}/logits"] = logits[:, stored_tokens(logits.shape[1])]
            found[f"{at}/logsumexp"] = np.logaddexp.reduce(logits.astype(np.float64), axis=1).astype(np.float32)
            found[f"{at}/continuation"] = generated.sequences[0, len(ids) :].numpy()
            found[f"{at}/lead"] = np.asarray([second - first for first, second in best], np.float32)
            print(at, repr(tokenizer.decode(found[f"{at}/continuation"]))[:100], found[f"{at}/lead"].min())
    np.savez_compressed(PATH, **found)


if __name__ == "__main__":
    main()
