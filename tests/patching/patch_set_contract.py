"""What every patch set promises, checked against the library that it patches.

A model is a *case*: a function of parameters and tokens that gives logits, small enough to run eagerly. The checks:

- `check_unpatched_outputs`: the same bits as in a process that has patched nothing;
- `check_sites`: every site of the design is there, once a layer, in the model's order, with its shape;
- `check_sums`: the residual stream adds up, and attention is what q, k and v make of it;
- `check_edits`: an edit at each site changes the logits, under jit and after a clean call, and leaves no trace;
- `check_agreement`: site by site the values of another library's run of the same weights.

The axes of a site are the same in every library: `[batch, seq, d_model]` for the stream, `[batch, seq, heads, d_head]`
for q, k, v and attn_heads, `[batch, heads, query, key]` for attn_logits and attn_probs, `[batch, seq, d_mlp]` for
mlp_pre and mlp_act.
"""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

import interp_jax as ij

LAYER_SITES = (
    "resid_pre", "attn_in", "q", "k", "v", "attn_logits", "attn_probs", "attn_heads", "attn_out", "resid_mid", "mlp_in",
    "mlp_pre", "mlp_act", "mlp_out", "resid_post",
)  # fmt: skip
"""The sites of every layer, in the order of a sequential block."""

Sites = dict[tuple[int | None, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a patched library."""

    forward: Callable[[Any, Any], Any]
    """`forward(params, tokens) -> logits[batch, seq, vocab]`, not jitted."""
    params: Any
    tokens: np.ndarray
    """[batch, seq], with batch, seq, heads, d_head, d_model and d_mlp all different where the library allows it."""
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    layer_sites: tuple[str, ...] = LAYER_SITES
    """In the order in which the model computes them."""
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """A site of the design that the architecture does not have, and why."""

    @property
    def every_site(self) -> list[tuple[int | None, str]]:
        """All sites in the model's order."""
        layers = [(layer, name) for layer in range(self.n_layers) for name in self.layer_sites]
        return [(None, "embed"), *layers, (None, "final_norm"), (None, "logits")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a site must have."""
        batch, seq = self.tokens.shape
        by_name = {
            "logits": (batch, seq, self.vocab),
            "q": (batch, seq, self.n_heads, self.d_head),
            "k": (batch, seq, self.n_kv_heads, self.d_head),
            "v": (batch, seq, self.n_kv_heads, self.d_head),
            "attn_heads": (batch, seq, self.n_heads, self.d_head),
            "attn_logits": (batch, self.n_heads, seq, seq),
            "attn_probs": (batch, self.n_heads, seq, seq),
            "mlp_pre": (batch, seq, self.d_mlp),
            "mlp_act": (batch, seq, self.d_mlp),
        }
        return by_name.get(name, (batch, seq, self.d_model))


def unpatched_logits(test_file: str, case: str) -> dict[str, np.ndarray]:
    """Logits of a case in a process of its own that has patched nothing.

    Args:
        test_file: `__file__` of the test module. It must have a function `make_case(name) -> Case`, and must not patch
            anything when it is imported.
        case: the name to hand to it.

    Returns:
        `eager` and `compiled`, [batch, seq, vocab] each.
    """
    return unpatched_logits_of_cases(test_file, [case])[case]


def unpatched_logits_of_cases(test_file: str, cases: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """`unpatched_logits` of several cases, in one process."""
    cases = list(cases)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits.npz"
        command = [sys.executable, "-W", "ignore", __file__, test_file, str(out), *cases]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(out) as logits:
            return {case: {kind: logits[f"{case}/{kind}"] for kind in ("eager", "compiled")} for case in cases}


def check_unpatched_outputs(case: Case, unpatched: Mapping[str, np.ndarray]) -> None:
    """The patched model gives the unpatched library's bits, eagerly and compiled."""
    np.testing.assert_array_equal(case.forward(case.params, case.tokens), unpatched["eager"])
    np.testing.assert_array_equal(jax.jit(case.forward)(case.params, case.tokens), unpatched["compiled"])


def check_sites(case: Case) -> Sites:
    """Every site is there with its shape, in the model's order.

    Returns:
        The values, from an eager pass.
    """
    missing = set(LAYER_SITES) - set(case.layer_sites)
    assert missing == set(case.absent), f"sites without a reason to be absent: {missing ^ set(case.absent)}"
    logits, values = ij.fetch(case.forward)(case.params, case.tokens)
    assert list(values) == case.every_site
    for (layer, name), value in values.items():
        assert value.shape == case.shape(name), (layer, name, value.shape, case.shape(name))
    np.testing.assert_array_equal(values[None, "logits"], logits)
    return {site: np.asarray(value, np.float32) for site, value in values.items()}


def check_sums(case: Case, values: Sites, *, parallel: bool = False, atol: float = 1e-5) -> None:
    """The residual stream adds up.

    Args:
        case: the model.
        values: all of its sites.
        parallel: attention and MLP both read `resid_pre` and are added together; there is no `resid_mid`.
        atol: for the sums, which a library may round otherwise; the stream of the cases is of order 1.
    """
    np.testing.assert_allclose(values[0, "resid_pre"], values[None, "embed"], atol=atol)
    for layer in range(case.n_layers):
        at = {name: values[layer, name] for name in case.layer_sites}
        if layer:
            np.testing.assert_array_equal(at["resid_pre"], values[layer - 1, "resid_post"])
        if parallel:
            np.testing.assert_allclose(at["resid_post"], at["resid_pre"] + at["attn_out"] + at["mlp_out"], atol=atol)
        else:
            np.testing.assert_allclose(at["resid_mid"], at["resid_pre"] + at["attn_out"], atol=atol)
            np.testing.assert_allclose(at["resid_post"], at["resid_mid"] + at["mlp_out"], atol=atol)


def check_attention(
    case: Case, values: Sites, *, scale: float | None = None, windows: Iterable[int | None] = (), rtol: float = 1e-4
) -> None:
    """attn_logits, attn_probs and attn_heads follow from q, k and v, written out.

    Args:
        case: the model, without soft caps.
        values: all of its sites.
        scale: what q.k is multiplied with; 1/sqrt(d_head) by default.
        windows: for each layer how many positions a query sees, itself included; None or left out: all before it.
        rtol: relative tolerance.
    """
    scale = case.d_head**-0.5 if scale is None else scale
    distance = np.subtract.outer(np.arange(case.tokens.shape[1]), np.arange(case.tokens.shape[1]))
    windows = list(windows) or [None] * case.n_layers
    for layer, window in zip(range(case.n_layers), windows, strict=True):
        q, k, v = (values[layer, name] for name in "qkv")
        k, v = (np.repeat(each, case.n_heads // case.n_kv_heads, axis=2) for each in (k, v))
        attn_logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
        np.testing.assert_allclose(values[layer, "attn_logits"], attn_logits, rtol=rtol, atol=1e-5)
        seen = (distance >= 0) & (distance < (window or len(distance)))
        exponentials = np.where(seen, np.exp(attn_logits - attn_logits.max(-1, keepdims=True)), 0)
        probs = exponentials / exponentials.sum(-1, keepdims=True)
        np.testing.assert_allclose(values[layer, "attn_probs"], probs, rtol=rtol, atol=1e-6)
        heads = np.einsum("bhqk,bkhd->bqhd", probs, v)
        np.testing.assert_allclose(values[layer, "attn_heads"], heads, rtol=rtol, atol=1e-5)


def check_edits(case: Case, *, tolerance: float = 1e-5) -> None:
    """An edit at each site changes the logits under jit, after an earlier clean call; the clean call stays as it was.

    Args:
        case: the model.
        tolerance: how far the looped program's logits may be from the clean program's, which is compiled otherwise.
    """
    compiled = jax.jit(case.forward)
    clean = np.asarray(compiled(case.params, case.tokens))
    sites = case.every_site

    @jax.jit
    def edited(params: Any, tokens: Any, factors: Any) -> Any:
        for i, (_, _, value) in enumerate(running := ij.iterate(compiled)(params, tokens)):
            # One component only: a norm takes back what scales all.
            running.modified_value = value.at[..., 0].multiply(factors[i].astype(value.dtype))
        return running.retval

    ones = np.ones(len(sites), np.float32)
    np.testing.assert_allclose(edited(case.params, case.tokens, ones), clean, rtol=1e-4, atol=tolerance)
    for i, site in enumerate(sites):
        factors = ones.copy()
        factors[i] = 3
        change = np.abs(np.asarray(edited(case.params, case.tokens, factors)) - clean).max()
        assert change > 10 * tolerance, (site, change)
    np.testing.assert_array_equal(compiled(case.params, case.tokens), clean)


def check_agreement(actual: Mapping[Any, np.ndarray], expected: Mapping[Any, np.ndarray], within: float = 1e-3) -> None:
    """Two libraries computed the same at every site.

    Args:
        actual: site to value.
        expected: the same of the other library.
        within: the largest difference allowed at a site, as a share of the root of the mean square of its values at the
            same position, all layers of a real model being of very different size.
    """
    assert actual.keys() == expected.keys()
    for site, value in expected.items():
        size = np.sqrt(np.mean(np.square(value, dtype=np.float64), axis=-1, keepdims=True)) + 1e-6
        worst = np.max(np.abs(actual[site] - value) / size)
        assert worst <= within, (site, worst)


def _write_unpatched(test_file: str, out: str, *case_names: str) -> None:
    spec = importlib.util.spec_from_file_location("case_module", test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(pathlib.Path(test_file).parent))
    sys.modules["case_module"] = module
    spec.loader.exec_module(module)
    logits: dict[str, np.ndarray] = {}
    for name in case_names:
        case = module.make_case(name)
        logits[f"{name}/eager"] = np.asarray(case.forward(case.params, case.tokens))
        logits[f"{name}/compiled"] = np.asarray(jax.jit(case.forward)(case.params, case.tokens))
    np.savez(out, **logits)


if __name__ == "__main__":
    _write_unpatched(*sys.argv[1:])
