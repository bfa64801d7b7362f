"""A vector of ours in our forward pass, against the same file's vector in a PyTorch hook on the same weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_hook
import safetensors.numpy
from pytorch_hook import COEFFICIENT, POSITIONS, pytorch_reference, steering_vector

from interp_jax.models.hugging_face import load_hugging_face
from interp_jax.models.transformer import apply
from interp_jax.steering import SteeringVector, add_vector, steered_forward

pytestmark = pytest.mark.caches  # The leak checker would trace every small operation anew.

HOOKED = np.load(pathlib.Path(__file__).with_name("pytorch_hook.npz"))


@pytest.mark.parametrize("case", pytorch_hook.CASES)
def test_logits_are_those_of_a_pytorch_hook(case, tmp_path):
    entry = pytorch_reference.read()[case]
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
    tensors = pytorch_reference.random_tensors(entry["shapes"], case)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    params = load_hugging_face(tmp_path)
    tokens = jnp.asarray(pytorch_reference.TOKENS)
    forward = jax.jit(steered_forward(apply))
    for where in POSITIONS:
        steering_vector(where).save(tmp_path / "vector.safetensors")
        vector = SteeringVector.load(tmp_path / "vector.safetensors")
        logits = forward(params, tokens, (add_vector(vector, COEFFICIENT),))
        expected = HOOKED[f"{case}/{where}"]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-6 * max(1, largest), err_msg=where)
        assert np.abs(logits - entry["logits"]).max() > 0.01 * largest  # the vector does something
