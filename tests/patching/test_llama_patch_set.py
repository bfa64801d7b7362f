"""What is checked for Llama alone; test_transformers_patch_set.py checks the contract for every family."""

import importlib
import importlib.util
import inspect
import pathlib
import sys

import jax
import numpy as np
import pytest
from test_transformers_patch_set import FAMILIES, make_case

import interp_jax as ij
import interp_jax.patching as patching

pytestmark = [
    pytest.mark.demo,
    # The library warns about its own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # What JAX keeps is part of what is tested; and the leak checker would trace every small operation anew.
    pytest.mark.caches,
]

MODULE = "transformers.models.llama.modeling_flax_llama"


@pytest.fixture(scope="module")
def library():
    patching.install("transformers")
    return importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def pristine(library):
    """The library's own file, run a second time under a name that no patch set knows."""
    name = "transformers.models.llama.pristine_flax_llama"
    spec = importlib.util.spec_from_file_location(name, library.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def case(library):
    return make_case("llama")


def _models(library, pristine):
    """The patched model and the library's own."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=64, **FAMILIES["llama"].options)
    return [module.FlaxLlamaForCausalLM(config, _do_init=False) for module in (library, pristine)]


def test_attention_patterns_are_the_library_s_to_the_bit(library, pristine, case):
    model, own = _models(library, pristine)
    actual, expected = (each(case.tokens, params=case.params, output_attentions=True) for each in (model, own))
    np.testing.assert_array_equal(actual.logits, expected.logits)
    np.testing.assert_array_equal(actual.attentions, expected.attentions)


def test_in_place_on_classes_and_functions_that_have_run_and_were_traced(library, pristine, case):
    members = {}
    for each in patching.load("transformers").modules[MODULE]:
        members.setdefault(each.member, []).append(each.pair)
    patcher = patching.Patcher(pristine, members, imports=["from interp_jax.instrument import site"])
    _, own = _models(library, pristine)
    compiled = jax.jit(lambda p, t: own(t, params=p).logits)
    clean = compiled(case.params, case.tokens)
    with patcher:
        logits, values = ij.fetch(compiled)(case.params, case.tokens)
        assert list(values) == case.every_site
        np.testing.assert_allclose(logits, clean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ij.SiteError):
        ij.fetch(compiled, ("mlp_out",))(case.params, case.tokens)
    np.testing.assert_array_equal(compiled(case.params, case.tokens), clean)


@pytest.mark.slow
def test_cached_generation_is_bit_identical_to_the_library_s(library, pristine, case):
    arguments = {"params": case.params, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    actual, expected = (each.generate(case.tokens, **arguments).sequences for each in _models(library, pristine))
    np.testing.assert_array_equal(actual, expected)


def test_installing_twice_is_installing_once(library):
    assert patching.install("transformers") is patching.install("transformers")


def test_the_source_that_tools_show_is_the_one_that_runs(library):
    source = inspect.getsource(library.FlaxLlamaDecoderLayer)
    assert 'site(self.mlp(hidden_states), "mlp_out", layer=int(self.name))  # ' in source
    assert "transformers.toml:" in source
    assert "site(" not in pathlib.Path(library.__file__).read_text()
