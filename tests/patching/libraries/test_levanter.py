"""The sets `levanter` and `haliax`: Llama and GPT-2 with scanned layers, Llama with layers in a loop; SmolLM2 in it."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import patch_set_contract as contract
import pytest
from real_weights import RealWeights, mean_loss

import interp_jax as ij
import interp_jax.patching as patching

sys.path.insert(0, str(pathlib.Path(__file__).parent / "stand_ins"))

# What JAX keeps is part of what is tested; and the leak checker would trace every small operation anew.
# The libraries warn about their own future.
pytestmark = [pytest.mark.caches, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")]

BATCH, SEQ, D_MODEL, D_MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 2, 10, 32, 48, 4, 2, 3, 64
D_HEAD = D_MODEL // HEADS

# Each with what it has of its own in its configuration. Checkpointing is the default; eagerly it compiles every layer.
CASES = {
    "llama": {},
    "llama, not scanned": {"scan_layers": False},
    "llama, scan in scan": {"gradient_checkpointing": "nested", "num_layers": 4},
    "llama, norms": {
        "hybrid_norm": True,
        "use_qk_norm": True,
        "input_embedding_norm": True,
        "gradient_checkpointing": False,
    },
    "gpt2": {"gradient_checkpointing": False},
    "gpt2, by depth": {"scale_attn_by_inverse_layer_idx": True, "gradient_checkpointing": False},
}


def _modules():
    names = ("haliax", "levanter.models.llama", "levanter.models.gpt2", "levanter.layers.attention")
    return [importlib.import_module(name) for name in names]


def _model(name, **options):
    """A model with random weights, its norms' scales and all biases included."""
    hax, llama, gpt2, attention = _modules()
    shape = {"seq_len": 16, "hidden_dim": D_MODEL, "num_layers": LAYERS, "num_heads": HEADS}
    options = {**shape, "attn_backend": attention.AttentionBackend.VANILLA, **CASES[name], **options}
    if name.startswith("llama"):
        rope = importlib.import_module("levanter.layers.rotary").DefaultRotaryEmbeddingsConfig(theta=500.0)
        config = llama.LlamaConfig(intermediate_dim=D_MLP, num_kv_heads=KV_HEADS, rope=rope, **options)
    else:
        config = gpt2.Gpt2Config(**options)
    return config.model_type.init(hax.Axis("vocab", VOCAB), config, key=jax.random.key(0))


def _forward_and_params(model):
    """A model as `forward(params, tokens)` on arrays, and its arrays."""
    import equinox as eqx

    hax, _, _, attention = _modules()
    params, static = eqx.partition(model, eqx.is_array)

    def forward(params, tokens):
        tokens = jnp.asarray(tokens)
        axes = [hax.Axis(name, size) for name, size in zip(("batch", "position"), tokens.shape, strict=True)]
        logits = eqx.combine(params, static)(hax.named(tokens, axes), attention.AttentionMask.causal())
        return logits.rearrange(("batch", "position", "vocab")).array

    return forward, params


def make_case(name, **options):
    forward, params = _forward_and_params(_model(name, **options))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape).astype(np.float32) if leaf.ndim else leaf, params
    )
    options = {**CASES[name], **options}
    is_llama = name.startswith("llama")
    return contract.Case(
        forward=forward,
        params=params,
        tokens=np.random.default_rng(1).integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32),
        n_layers=options.get("num_layers", LAYERS),
        d_model=D_MODEL,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS if is_llama else HEADS,
        d_head=D_HEAD,
        d_mlp=D_MLP if is_llama else 4 * D_MODEL,
        vocab=VOCAB,
    )


@pytest.fixture(scope="module")
def unpatched():
    return contract.unpatched_logits_of_cases(__file__, CASES)


@pytest.fixture(scope="module")
def case_of():
    patching.install("haliax")
    patching.install("levanter")
    return functools.cache(make_case)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_bit_identical_to_the_library_s(name, case_of, unpatched):
    contract.check_unpatched_outputs(case_of(name), unpatched[name])


@pytest.mark.parametrize("name", CASES)
def test_every_site_is_there_and_says_what_its_name_says(name, case_of):
    case = case_of(name)
    values = contract.check_sites(case)
    contract.check_sums(case, values)
    contract.check_attention(case, values)


@pytest.mark.parametrize("name", CASES)
def test_an_edit_at_each_site_changes_the_logits(name, case_of):
    contract.check_edits(case_of(name))


def test_the_files_declare_the_sites_that_they_make():
    modules = patching.load("levanter").modules
    of_llama = ("levanter.models.llama", "levanter.layers.attention")
    of_gpt2 = ("levanter.models.gpt2", "levanter.models.lm_model")
    declared = {module: {site for pair in pairs for site in pair.sites} for module, pairs in modules.items()}
    every = {*contract.LAYER_SITES, "embed", "final_norm", "logits"}
    assert set.union(*(declared[module] for module in of_llama)) == every
    of_attention = {"attn_logits", "attn_probs"}
    assert set.union(*(declared[module] for module in of_gpt2)) == every - of_attention
    assert not any(pair.sites for pairs in patching.load("haliax").modules.values() for pair in pairs)


# ---------------------------------------------------------------- scanned, as not scanned


@pytest.fixture(scope="module")
def by_hand(case_of):
    """The layers in a loop with the weights of those that are scanned: values and gradients."""
    scanned, looped = case_of("llama"), case_of("llama, not scanned")
    blocks = [
        _filled(block, [leaf[layer] for leaf in jax.tree.leaves(scanned.params.transformer.layers)])
        for layer, block in enumerate(looped.params.transformer.layers.blocks)
    ]
    layers = dataclasses.replace(looped.params.transformer.layers, blocks=blocks)
    norm = _filled(looped.params.transformer.norm, jax.tree.leaves(scanned.params.transformer.norm))
    transformer = dataclasses.replace(looped.params.transformer, layers=layers, norm=norm)
    params = dataclasses.replace(scanned.params, transformer=transformer)
    _, values = ij.fetch(looped.forward)(params, looped.tokens)
    _, gradients = ij.gradients(looped.forward, "resid_post", 1, objective=_objective)(params, looped.tokens)
    return values, gradients


def _filled(module, leaves):
    return jax.tree.unflatten(jax.tree.structure(module), leaves)


def _objective(logits):
    return logits[:, -1, 3].sum() - logits[:, -1, 5].sum()


POLICIES = [True, False, "recompute", "save_all", "nested", "save inputs"]


def _policy_case(policy):
    if policy == "save inputs":
        from haliax.nn import ScanCheckpointPolicy

        policy = ScanCheckpointPolicy(save_inputs=True)
    return make_case("llama", gradient_checkpointing=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_layer_is_fetched_under_jit_whatever_is_checkpointed(policy, by_hand):
    case = _policy_case(policy)
    expected, _ = by_hand
    fetch = jax.jit(ij.fetch(case.forward, ("resid_post", "attn_probs"), 1))
    logits, values = fetch(case.params, case.tokens)
    assert list(values) == [(1, "attn_probs"), (1, "resid_post")]
    for site, value in values.items():
        assert type(value) is not type(case.params.embeddings.token_embeddings.weight)
        np.testing.assert_allclose(value, expected[site], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, case.forward(case.params, case.tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_at_one_layer_whatever_is_checkpointed(policy, by_hand):
    case = _policy_case(policy)
    _, expected = by_hand
    gradients_of = jax.jit(ij.gradients(case.forward, "resid_post", 1, objective=_objective))
    _, gradients = gradients_of(case.params, case.tokens)
    assert list(gradients) == [(1, "resid_post")]
    np.testing.assert_allclose(gradients[1, "resid_post"], expected[1, "resid_post"], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("case_of")
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_the_weights_through_an_edit(policy):
    case = _policy_case(policy)

    def loss(params, factor):
        for layer, _, value in (running := ij.iterate(case.forward, sites="mlp_out")(params, case.tokens)):
            if layer == 1:
                running.modified_value = factor * value
        return _objective(running.retval)

    # An MLP's output times a factor is its last matrix times a factor.
    def scaled(params, factor):
        weight = params.transformer.layers.stacked.mlp.down_proj.weight
        factors = jnp.ones(LAYERS).at[1].set(factor)
        scaled = dataclasses.replace(weight, array=weight.array * factors[:, None, None])
        path = ("transformer", "layers", "stacked", "mlp", "down_proj", "weight")
        return _objective(case.forward(_replaced(params, path, scaled), case.tokens))

    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(case.params, 2.0)
    expected = jax.jit(jax.grad(scaled, argnums=(0, 1)))(case.params, 2.0)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4), actual, expected)


def _replaced(node, path, value):
    if not path:
        return value
    return dataclasses.replace(node, **{path[0]: _replaced(getattr(node, path[0]), path[1:], value)})


@pytest.mark.usefixtures("case_of")
def test_a_layer_costs_no_unrolling():
    case = _policy_case(False)

    def matmuls(jaxpr):
        inner = [one for eqn in jaxpr.eqns for one in jax.extend.core.jaxprs_in_params(eqn.params)]
        return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(matmuls, inner))

    plain = jax.make_jaxpr(case.forward)(case.params, case.tokens)
    fetching = jax.make_jaxpr(ij.fetch(case.forward, "mlp_out", 1))(case.params, case.tokens)
    assert matmuls(fetching.jaxpr) == matmuls(plain.jaxpr)


# ---------------------------------------------------------------- attention that is fused


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_fused_attention_all_else_is_there(name, case_of):
    attention = _modules()[3]
    fused = {"attn_backend": attention.AttentionBackend.JAX_FLASH, "flash_attention_block_size": 5}
    case, fused_case = case_of(name), make_case(name, **fused)
    _, values = ij.fetch(fused_case.forward)(fused_case.params, case.tokens)
    _, expected = ij.fetch(case.forward)(case.params, case.tokens)
    without = [site for site in expected if site[1] not in ("attn_logits", "attn_probs")]
    assert list(values) == without
    for site in without:
        np.testing.assert_allclose(values[site], expected[site], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_library_s_loss_has_every_site_but_the_logits(name, case_of):
    from levanter.models.lm_model import LmExample, compute_next_token_loss

    hax = _modules()[0]
    model, case = _model(name, seq_len=SEQ), case_of(name)

    def loss(tokens):
        row = hax.named(jnp.asarray(tokens), hax.Axis("position", SEQ))
        # Its own mean does not run on this JAX, which wants a mask of booleans.
        return compute_next_token_loss(model, LmExample.causal(row), reduction=None).array.sum()

    _, values = jax.jit(ij.fetch(loss))(case.tokens[0])
    assert list(values) == case.every_site[:-1]
    assert values[1, "attn_probs"].shape == (HEADS, SEQ, SEQ)  # no batch: levanter maps it over examples
    assert values[1, "q"].shape == (SEQ, HEADS, D_HEAD)


# ---------------------------------------------------------------- generation with a cache


def _decode(model, tokens):
    """All tokens of one sequence in one step, into an empty cache of pages of four."""
    hax = _modules()[0]
    from levanter.inference.page_table import PageBatchInfo, PageTableSpec

    spec = PageTableSpec(num_pages=4, page_size=4)
    Position, Seq = hax.Axis("position", len(tokens)), hax.Axis("seq", 1)
    positions = hax.arange(Position, dtype=jnp.int32)
    info = PageBatchInfo(
        slot_ids=hax.zeros(Seq, dtype=jnp.int32),
        page_indices=hax.arange(hax.Axis("page", 4), dtype=jnp.int32).broadcast_axis(Seq),
        seq_lens=hax.full(Seq, len(tokens), dtype=jnp.int32),
        cu_q_lens=hax.named(jnp.array([0, len(tokens)], jnp.int32), "seq"),
        num_seqs=jnp.array(1, jnp.int32),
        new_token_dests=positions,
        page_size=4,
    )
    cache = model.transformer.initial_cache(spec, dtype=jnp.float32)
    logits, _ = model.decode(hax.named(jnp.asarray(tokens), Position), cache, info, positions)
    return logits.array


def test_decoding_has_the_sites_of_the_forward_pass(case_of):
    case, model = case_of("llama"), _model("llama")
    forward, params = _forward_and_params(model)
    expected_logits, expected = ij.fetch(forward)(params, case.tokens)
    logits, values = jax.jit(ij.fetch(functools.partial(_decode, model)))(case.tokens[0])
    assert sorted(map(str, values)) == sorted(
        str(site) for site in expected if site[1] not in ("attn_logits", "attn_probs")
    )
    np.testing.assert_allclose(logits, expected_logits[0], rtol=1e-3, atol=1e-4)
    for site, value in values.items():
        np.testing.assert_allclose(value, expected[site][0], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2(case_of):
    hax, llama, _, attention = _modules()
    from haliax.state_dict import from_torch_compatible_state_dict
    from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig

    real = RealWeights("smollm2")
    config = llama.LlamaConfig(
        seq_len=2048,
        hidden_dim=576,
        intermediate_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        rope=DefaultRotaryEmbeddingsConfig(theta=100000.0),
        attn_backend=attention.AttentionBackend.VANILLA,
    )
    import equinox as eqx

    build = functools.partial(llama.LlamaLMHeadModel.init, hax.Axis("vocab", 49152), config, key=jax.random.key(0))
    parts = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    parts += [f"self_attn.{name}_proj" for name in "qkvo"]
    names = ["embed_tokens", "norm", *(f"layers.{layer}.{part}" for layer in range(30) for part in parts)]
    weights = {f"model.{name}.weight": real.weight(f"model.{name}.weight") for name in names}
    model = from_torch_compatible_state_dict(eqx.filter_eval_shape(build), weights)
    return real, *_forward_and_params(model)


@pytest.mark.slow
def test_smollm2_gives_the_reference_loss(smollm2):
    real, forward, params = smollm2
    compiled = jax.jit(forward)
    logits = np.concatenate([compiled(params, rows) for rows in np.split(real.rows, 4)])
    assert abs(mean_loss(logits, real.rows) - real.loss) < 1e-3


@pytest.mark.slow
def test_smollm2_agrees_with_another_library_site_by_site(smollm2):
    real, forward, params = smollm2
    _, values = jax.jit(ij.fetch(forward))(params, real.tokens)
    actual = {site: np.asarray(value) for site, value in values.items()}
    contract.check_agreement(actual, real.sites)
