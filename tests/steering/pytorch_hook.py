"""What PyTorch computes with a vector of ours added by a plain forward hook: written once, compared ever after.

`python tests/steering/pytorch_hook.py`, where PyTorch is installed (extra `peers`), writes `pytorch_hook.npz`. The
vectors are read from files that `SteeringVector.save` wrote; weights and tokens are those of
`tests/models/pytorch_reference.py`, which are drawn from a seed.
"""

import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
# pytest may not have been among the models' tests yet, and a script never was: hence an import that is not at the top.
sys.path.insert(0, str(HERE.parent / "models"))
import pytorch_reference  # noqa: E402

from interp_jax.steering import SteeringVector  # noqa: E402

CASES = ("gpt2", "llama", "gemma2")
LAYER, COEFFICIENT = 1, 1.5
POSITIONS = {"everywhere": "all", "at three tokens": (2, 3, 4)}


def steering_vector(where: str) -> SteeringVector:
    """One row for every position; or a row for each of three tokens."""
    rows = np.random.default_rng(3).normal(size=(3, 24)).astype(np.float32)
    positions = POSITIONS[where]
    return SteeringVector(rows[0] if positions == "all" else rows, LAYER, positions=positions)


def hooked_logits(case: str, path: pathlib.Path, positions: object) -> np.ndarray:
    """Logits of PyTorch's model with the vector of a file added to what the layer gives."""
    import safetensors.torch
    import torch
    import transformers

    class_name, fields = pytorch_reference.CASES[case]
    # Not SDPA, which leaves soft caps out.
    config = getattr(transformers, f"{class_name}Config")(**fields, attn_implementation="eager")
    suffix = "LMHeadModel" if class_name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{class_name}{suffix}")(config).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    tensors = pytorch_reference.random_tensors(shapes, case)
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=False)
    model.tie_weights()
    (direction,) = safetensors.torch.load_file(path).values()

    def hook(module, inputs, output):
        stream = output[0] if isinstance(output, tuple) else output
        where = slice(None) if positions == "all" else list(positions)
        stream = stream.clone()
        stream[:, where] += COEFFICIENT * direction
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    layers = next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList))
    layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        return model(torch.tensor(pytorch_reference.TOKENS), use_cache=False).logits.numpy()


def main() -> None:
    """Writes the file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for where, positions in POSITIONS.items():
            path = pathlib.Path(folder) / f"{where}.safetensors"
            steering_vector(where).save(path)
            found |= {f"{case}/{where}": hooked_logits(case, path, positions) for case in CASES}
    np.savez_compressed(HERE / "pytorch_hook.npz", **found)


if __name__ == "__main__":
    main()
