"""From a model to stores: one pass for all sites, on from where it stopped, a range of the rows a process."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.activations import store_activations as module
from interp_jax.activations.store import ActivationStore
from interp_jax.activations.store_activations import site_folder, store_activations, store_sites
from interp_jax.models.tiny import load_tiny

pytestmark = pytest.mark.caches
SITES = [(2, "resid_post"), (1, "mlp_act"), (None, "embed")]


@pytest.fixture(scope="module")
def model():
    return load_tiny(layers="unrolled")


@pytest.fixture(scope="module")
def rows(model):
    return np.random.default_rng(0).integers(0, model.vocab_size, size=(13, 16), dtype=np.int32)


@pytest.fixture(scope="module")
def expected(model, rows):
    """By a fetch of everything, row by row of the first 12."""
    names, layers = {name for _, name in SITES}, {layer for layer, _ in SITES}
    _, values = ij.fetch(model.forward, names, layers)(model.params, jnp.asarray(rows[:12]))
    return {site: np.asarray(values[site])[:, 1:].reshape(12 * 15, -1) for site in SITES}


def of_all(store):
    return store.rows(np.arange(store.n_rows))


def agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_several_sites_are_stored_from_one_pass(model, rows, expected, tmp_path, capsys):
    passes = []

    def forward(params, tokens):
        passes.append(tokens.shape)
        return model.forward(params, tokens)

    watched = dataclasses.replace(model, forward=forward)
    stores = store_sites(watched, rows, tmp_path, sites=SITES, batch_rows=4)
    assert len(passes) == 2, "once to list the sites, once to compile"
    assert list(stores) == SITES
    for site, store in stores.items():
        agree(of_all(store), expected[site])
        assert store.is_finished
        assert store.provenance["site"] == site[1]
        np.testing.assert_array_equal(of_all(ActivationStore.open(site_folder(tmp_path, site))), of_all(store))
    again = store_sites(model, rows, tmp_path, sites=SITES, batch_rows=4)
    assert "from a run before" in capsys.readouterr().err
    np.testing.assert_array_equal(of_all(again[SITES[1]]), of_all(stores[SITES[1]]))


def test_stores_that_stopped_apart_go_on_together(model, rows, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1)  # a shard a batch
    stores = store_sites(model, rows, tmp_path, sites=SITES, batch_rows=4)
    shutil.rmtree(tmp_path / "mlp_act.1" / "part_00000" / "shard_00001")
    shutil.rmtree(tmp_path / "embed" / "part_00000" / "shard_00002")
    with pytest.warns(UserWarning, match="is damaged"):
        stores = store_sites(model, rows, tmp_path, sites=SITES, batch_rows=4)
    for site, store in stores.items():
        assert store.n_batches == 3
        agree(of_all(store), expected[site])


def test_several_processes_take_a_range_of_the_rows_each(model, rows, expected, tmp_path):
    (site, *_) = SITES
    for number in (1, 0):
        own = store_activations(model, rows, tmp_path, layer=site[0], site=site[1], batch_rows=4, part=(number, 2))
        assert own.n_batches == (1, 2)[number]
    agree(of_all(ActivationStore.open(tmp_path)), expected[site])


def test_a_site_that_is_not_there_and_a_full_disk_are_told_before_anything_is_computed(
    model, rows, tmp_path, monkeypatch
):
    with pytest.raises(ij.SiteError, match=r"no site 'resid_pots' at layer 2; there are .*resid_post"):
        store_activations(model, rows, tmp_path, site="resid_pots", layer=2)
    with pytest.raises(ValueError, match="each once"):
        store_sites(model, rows, tmp_path, sites=[SITES[0], SITES[0]])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        OSError, match=r"what is still to come, 180 activations, takes up to 1\.\d MB, and 1\.0 MB are free"
    ):
        store_activations(model, rows, tmp_path, site="mlp_act", layer=1, batch_rows=4)


def test_a_model_in_bfloat16_is_stored_as_it_computes_and_not_taken_for_another(model, rows, expected, tmp_path):
    narrow = load_tiny(dtype=jnp.bfloat16)
    store = store_activations(narrow, rows, tmp_path, site="resid_post", layer=2, batch_rows=4)
    assert store.dtype == "bfloat16"
    found, exact = np.float32(of_all(store)), expected[2, "resid_post"]
    # bfloat16 rounds by up to 0.4 % at each of two layers' sums; float32 would be at 1e-6.
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.02
    with pytest.raises(ValueError, match="dtype 'bfloat16', not 'float32'"):
        store_activations(model, rows, tmp_path, site="resid_post", layer=2, batch_rows=4)
