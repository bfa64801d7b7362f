"""Ids that are no tokens are told with their place, and rows of any kind become one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.token_ids import check_ids, token_rows

pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.mark.parametrize("given", [[[1, 2], [0, 9]], np.array([[1, 2], [0, 9]], np.int64), jnp.array([[1, 2], [0, 9]])])
def test_rows_of_any_kind_are_one_array(given):
    rows = token_rows(given, 10)
    assert isinstance(rows, jax.Array)
    np.testing.assert_array_equal(rows, [[1, 2], [0, 9]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2], [0, 10]], r"tokens\[1, 1\] is 10; the model's tokens are 0 to 9"),
        ([[-1, 2]], r"tokens\[0, 0\] is -1"),
        ([[1.0, 2.0]], r"tokens has dtype float64; token ids are integers. tokenizer.encode"),
        ([["The", " city"]], r"tokens has dtype <U5"),
        ([[1, 2], [3]], r"tokens has rows of 2, 1 tokens; they must be of one length"),
        ([1, 2], r"tokens has shape \(2,\); it must be \[batch, seq\]: jnp.array\(\[ids\]\)"),
        (np.zeros((1, 0), np.int32), r"tokens has shape \(1, 0\)"),
    ],
)
def test_what_is_no_row_of_tokens_is_told(given, message):
    with pytest.raises(ValueError, match=message):
        token_rows(given, 10)


def test_under_jit_ids_are_not_known():
    np.testing.assert_array_equal(jax.jit(lambda ids: token_rows(ids, 10))(jnp.array([[11]])), [[11]])
    with pytest.raises(ValueError, match="answer is 10"):
        check_ids(10, 10, "answer")
