"""Streams: the right values, in the text's order, and no work above the site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.activations.stream import stream_activations, stream_sites
from interp_jax.instrument import SiteError, site

PARAMS = jax.random.normal(jax.random.key(0), (50, 8))
TOKENS = [np.arange(12).reshape(2, 6) + number for number in range(5)]


def looped(params, tokens):
    x = params[tokens]
    for layer in range(3):
        x = site(x * 2, "resid_post", layer=layer)
    return x


def under_checkpoint(params, tokens):
    def block(params, tokens):
        return site(params[tokens] * 4, "resid_post", layer=1) + 1

    return jax.checkpoint(block)(params, tokens)


@pytest.mark.parametrize("forward", [looped, under_checkpoint])
@pytest.mark.parametrize("skip_first", [0, 2])
def test_gives_the_site_s_values_in_order(forward, skip_first):
    stream = stream_activations(forward, PARAMS, TOKENS, site="resid_post", layer=1, skip_first=skip_first)
    for found, tokens in zip(stream, TOKENS, strict=True):
        expected = np.asarray(PARAMS)[tokens[:, skip_first:]].reshape(-1, 8) * 4
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_heads_are_flattened():
    def forward(params, tokens):
        return site(params[tokens].reshape(*tokens.shape, 2, 4), "attn_heads", layer=0)

    (found,) = stream_activations(forward, PARAMS, TOKENS[:1], site="attn_heads", layer=0)
    np.testing.assert_array_equal(found, np.asarray(PARAMS)[TOKENS[0]].reshape(-1, 8))


def test_nothing_above_the_site_is_traced():
    def forward(params, tokens):
        x = site(params[tokens], "resid_post", layer=0)
        raise AssertionError(f"went on to {x}")

    (found,) = stream_activations(forward, PARAMS, TOKENS[:1], site="resid_post", layer=0)
    assert found.shape == (12, 8)


def test_bad_inputs_name_what_exists():
    with pytest.raises(SiteError, match="resid_post"):
        next(stream_activations(looped, PARAMS, TOKENS, site="resid_pots", layer=1))
    with pytest.raises(ValueError, match=r"token batch 0 has shape \(2, 6\); expected .* more than 6 positions"):
        next(stream_activations(looped, PARAMS, TOKENS, site="resid_post", layer=1, skip_first=6))
    with pytest.raises(ValueError, match="skip_first is -1"):
        next(stream_activations(looped, PARAMS, TOKENS, site="resid_post", layer=1, skip_first=-1))
    assert list(stream_activations(looped, PARAMS, [], site="resid_post", layer=1)) == []
    assert jnp.asarray(TOKENS[0]).ndim == 2


@pytest.mark.parametrize("forward", [looped, under_checkpoint])
def test_several_sites_come_from_one_pass(forward):
    sites = [(1, "resid_post")] if forward is under_checkpoint else [(1, "resid_post"), (0, "resid_post")]
    calls = []

    def counted(params, tokens):
        calls.append(1)
        return forward(params, tokens)

    for found, tokens in zip(stream_sites(counted, PARAMS, TOKENS, sites=sites, skip_first=1), TOKENS, strict=True):
        assert list(found) == sites
        for (layer, _), value in found.items():
            expected = np.asarray(PARAMS)[tokens[:, 1:]].reshape(-1, 8) * 2 ** (layer + 1)
            np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_nothing_above_the_last_wanted_site_is_traced():
    def forward(params, tokens):
        x = site(params[tokens], "resid_post", layer=0)
        x = site(x, "mlp_out", layer=0)
        x = site(x, "resid_post", layer=1)
        raise AssertionError(f"went on to {x}")

    sites = [(1, "resid_post"), (0, "mlp_out")]
    (found,) = stream_sites(forward, PARAMS, TOKENS[:1], sites=sites)
    assert list(found) == sites


def test_one_of_several_sites_that_is_not_there_is_named():
    def forward(params, tokens):
        x = site(params[tokens], "embed")
        return site(x, "resid_post", layer=0)

    with pytest.raises(SiteError, match=r"no site \[\(0, 'embed'\)\]; of those asked for it has .*\(0, 'resid_post'\)"):
        next(stream_sites(forward, PARAMS, TOKENS, sites=[(0, "resid_post"), (0, "embed"), (None, "embed")]))
    for sites in ([], [(0, "embed"), (0, "embed")]):
        with pytest.raises(ValueError, match="each once"):
            stream_sites(forward, PARAMS, TOKENS, sites=sites)
