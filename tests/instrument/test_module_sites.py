"""Modules' outputs as sites, against the submodules called by hand."""

import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interp_jax as ij

X = np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(2, 3)
close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6))


def same(values, expected):
    """The same sites in the same order, with the same values."""
    assert list(values) == list(expected)
    close(list(values.values()), list(expected.values()))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.mlp(x))


class Model(nnx.Module):
    def __init__(self, rngs, wrap=lambda block, x: block(x)):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.out = nnx.Linear(3, 4, rngs=rngs)
        self.wrap = wrap

    def __call__(self, x):
        for block in self.blocks:
            x = self.wrap(block, x)
        return self.out(x)


def nnx_by_hand(model, x, edit=lambda layer, value: value):
    values = {}
    for layer, block in enumerate(model.blocks):
        mlp = edit(layer, x @ block.mlp.kernel[...] + block.mlp.bias[...])
        x = x + jnp.tanh(mlp)
        values[layer, "blocks.mlp"], values[layer, "blocks"] = mlp, x
    values[None, "out"] = values[None, "Model"] = x @ model.out.kernel[...] + model.out.bias[...]
    return values


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(3, name="mlp")(x))


class LinenModel(nn.Module):
    wrap: type = LinenBlock
    numbered: str = "blocks_{}"

    @nn.compact
    def __call__(self, x):
        for layer in range(2):
            x = self.wrap(name=self.numbered.format(layer))(x)
        return nn.Dense(4, name="out")(x)


def linen_by_hand(variables, x, numbered="blocks_{}"):
    params, values = variables["params"], {}
    for layer in range(2):
        mlp = params[numbered.format(layer)]["mlp"]
        values[layer, "blocks.mlp"] = x @ mlp["kernel"] + mlp["bias"]
        x = values[layer, "blocks"] = x + jnp.tanh(values[layer, "blocks.mlp"])
    values[None, "out"] = values[None, "LinenModel"] = x @ params["out"]["kernel"] + params["out"]["bias"]
    return values


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def variables():
    return LinenModel().init(jax.random.key(0), X)


AROUND = {"eager": lambda function: function, "jit": jax.jit, "checkpoint": jax.checkpoint, "nnx.jit": nnx.jit}
around = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())


@around
def test_nnx_outputs(model, around):
    out, values = around(ij.fetch(ij.module_sites(model)))(X)
    same(values, nnx_by_hand(model, X))
    close(out, values[None, "Model"])


@pytest.mark.caches
@around
def test_nnx_under_a_transformation_inside_the_pass(model, around):
    _, values = ij.fetch(around(ij.module_sites(model)))(X)
    same(values, nnx_by_hand(model, X))


@pytest.mark.caches
@around
@pytest.mark.parametrize("numbered", ["blocks_{}", "{}"])
def test_linen_outputs(around, numbered):
    linen = LinenModel(numbered=numbered)
    variables = linen.init(jax.random.key(1), X)
    expected = linen_by_hand(variables, X, numbered)
    if numbered == "{}":
        renamed = {"blocks.mlp": "mlp", "blocks": "LinenBlock"}
        expected = {(layer, renamed.get(name, name)): value for (layer, name), value in expected.items()}
    out, values = around(ij.fetch(ij.module_sites(linen)))(variables, X)
    same(values, expected)
    close(out, expected[None, "out"])
    same(ij.fetch(around(ij.module_sites(linen)))(variables, X)[1], expected)


@pytest.mark.caches
def test_functions_that_call_modules(model, variables):
    expected = nnx_by_hand(model, X)
    same(ij.fetch(ij.module_sites(lambda x, given: given["model"](x)))(X, {"model": model})[1], expected)
    same(ij.fetch(ij.module_sites(jax.jit(lambda model, x: model(x))))(model, X)[1], expected)
    # A module that is only closed over is unknown.
    assert list(ij.iterate(ij.module_sites(lambda x: model(x)))(X)) == []
    expected = linen_by_hand(variables, X)
    same(ij.fetch(ij.module_sites(LinenModel().apply))(variables, X)[1], expected)
    same(ij.fetch(ij.module_sites(lambda x: LinenModel().apply(variables, x)))(X)[1], expected)
    same(ij.fetch(ij.module_sites(LinenModel().bind(variables)))(X)[1], expected)


def test_a_method_of_a_module():
    class Coder(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.decoder = nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

        def encode(self, x):
            return self.encoder(x)

    coder = Coder(nnx.Rngs(0))
    out, values = ij.fetch(ij.module_sites(coder.encode))(X)
    same(values, {(None, "encoder"): out})
    close(out, coder.encode(X))


def test_edits(model, variables):
    out = ij.inject(ij.module_sites(model))({(1, "blocks.mlp"): jnp.zeros((2, 3))}, X)
    close(out, nnx_by_hand(model, X, lambda layer, value: value * 0 if layer == 1 else value)[None, "out"])
    for _, name, value in (running := ij.iterate(ij.module_sites(LinenModel()))(variables, X)):
        if name == "out":
            running.modified_value = value + 1.0
    close(running.retval, linen_by_hand(variables, X)[None, "out"] + 1.0)


def test_the_gradient_of_an_objective_of_modules_outputs(model):
    def loss(model, x):
        for layer, name, value in (running := ij.iterate(ij.module_sites(model), sites="blocks.mlp")(x)):
            running.save((layer, name), (value**2).sum())
            del value
        return sum(running.saved.values())

    def by_hand(model, x):
        values = nnx_by_hand(model, x)
        return sum((values[layer, "blocks.mlp"] ** 2).sum() for layer in range(2))

    actual, expected = jax.grad(loss)(model, X), jax.grad(by_hand)(model, X)
    close(nnx.to_pure_dict(nnx.state(actual)), nnx.to_pure_dict(nnx.state(expected)))


def test_list_sites_of_a_model_of_shapes(model):
    shapes = jax.eval_shape(lambda: Model(nnx.Rngs(0)))
    table = ij.list_sites(ij.module_sites(lambda model, x: model(x)))(shapes, jax.ShapeDtypeStruct((5, 3), jnp.float32))
    assert [(row.layer, row.name) for row in table] == list(nnx_by_hand(model, X))
    assert table[-1].shape == (5, 4)


def test_nothing_listening_leaves_no_trace_in_the_jaxpr(model, variables):
    assert str(jax.make_jaxpr(ij.module_sites(model))(X)) == str(jax.make_jaxpr(model)(X))
    linen = LinenModel()
    with_sites = jax.make_jaxpr(ij.module_sites(linen))(variables, X)
    assert str(with_sites) == str(jax.make_jaxpr(linen.apply)(variables, X))


# Names


def test_modules_shared_and_called_again():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = self.second = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    shared = Shared(nnx.Rngs(0))
    once = shared.first(X)
    twice = shared.first(once)
    values = ij.fetch(ij.module_sites(shared))(X)[1]
    same(values, {(None, "first"): once, (None, "first#2"): twice, (None, "Shared"): twice})

    class SharedLinen(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return dense(dense(x))

    variables = SharedLinen().init(jax.random.key(0), X)
    values = ij.fetch(ij.module_sites(SharedLinen()))(variables, X)[1]
    assert list(values) == [(0, "Dense"), (0, "Dense#2"), (None, "SharedLinen")]


def test_only_the_first_number_is_the_layer():
    class Experts(nnx.Module):
        def __init__(self, rngs):
            self.experts = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return sum(expert(x) for expert in self.experts)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Experts(rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    values = ij.fetch(ij.module_sites(Stack(nnx.Rngs(0))), layers=1)(X)[1]
    assert list(values) == [(1, "layers.experts.0"), (1, "layers.experts.1"), (1, "layers")]


def test_outputs_that_are_trees_and_outputs_that_are_not_arrays():
    class Inner(nnx.Module):
        def __init__(self, output):
            self.output = output

        def __call__(self, x):
            return self.output(x)

    class Outer(nnx.Module):
        def __init__(self):
            self.tree, self.text = Inner(lambda x: (x, {"twice": 2 * x}, None)), Inner(lambda x: "text")
            self.nothing = Inner(lambda x: None)

        def __call__(self, x):
            return self.tree(x)[1]["twice"], self.text(x), self.nothing(x)

    for _, _, value in (running := ij.iterate(ij.module_sites(Outer()))(X)):
        running.modified_value = jax.tree.map(lambda leaf: leaf + 1, value)
    assert [name for _, name, _ in ij.iterate(ij.module_sites(Outer()))(X)] == ["tree"]
    out, text, nothing = running.retval
    close(out, 2 * X + 1)
    assert (text, nothing) == ("text", None)


# Transformations inside the model


@pytest.mark.caches
@pytest.mark.parametrize(
    "lift", [nn.jit, nn.remat, lambda block: nn.jit(nn.remat(block))], ids=["jit", "remat", "both"]
)
def test_linen_lifts_of_each_block(variables, lift):
    linen = LinenModel(wrap=lift(LinenBlock))
    for function in (ij.fetch(ij.module_sites(linen)), jax.jit(ij.fetch(ij.module_sites(linen)))):
        same(function(variables, X)[1], linen_by_hand(variables, X))


def test_linen_scan_shows_its_body_and_not_each_layer():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return stack(LinenBlock(name="blocks"), x, None)[0]

    variables = Scanned().init(jax.random.key(0), X)
    seen = []
    for layer, name, value in (running := ij.iterate(ij.module_sites(Scanned()))(variables, X)):
        seen.append((layer, name))
        if name.startswith("blocks.mlp"):
            running.modified_value = value * 0
        del value
    # nn.scan traces its body twice, and throws the first trace away.
    assert seen == [(None, name) for name in ("blocks.mlp", "blocks", "blocks.mlp#2", "blocks#2", "Scanned")]
    close(running.retval, X)


def test_nnx_stack_under_a_scan(model):
    class Scanned(nnx.Module):
        def __init__(self):
            blocks = [nnx.clone(block) for block in model.blocks]
            self.blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

        def __call__(self, x):
            return jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]

    seen = []
    for layer, name, value in (running := ij.iterate(ij.module_sites(Scanned()))(X)):
        seen.append((layer, name))
        if name == "blocks.mlp":
            running.modified_value = value * 0
        del value
    assert seen == [(None, "blocks.mlp"), (None, "blocks"), (None, "Scanned")]
    close(running.retval, X)


@pytest.mark.caches
def test_nnx_blocks_that_a_transformation_rebuilds_are_never_called_another_layer():
    rebuilding = Model(nnx.Rngs(0), wrap=jax.checkpoint(lambda block, x: block(x)))
    _, values = ij.fetch(ij.module_sites(rebuilding))(X)
    expected = nnx_by_hand(rebuilding, X)
    names = ["Block.mlp", "Block", "Block.mlp#2", "Block#2", "out", "Model"]
    same(values, {(None, name): value for name, value in zip(names, expected.values(), strict=True)})

    class RematBlock(Block):  # as a decorator of __call__: the call comes to the block itself
        __call__ = jax.checkpoint(Block.__call__)

    class RematModel(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.blocks = nnx.List([RematBlock(rngs), RematBlock(rngs)])

    remat = RematModel(nnx.Rngs(0))
    expected = nnx_by_hand(remat, X)
    expected[None, "RematModel"] = expected.pop((None, "Model"))
    same(ij.fetch(ij.module_sites(remat))(X)[1], expected)


@pytest.mark.caches
def test_functions_traced_before_are_seen_and_edits_leave_nothing_behind(variables):
    linen, nnx_model = LinenModel(wrap=nn.jit(LinenBlock)), Model(nnx.Rngs(0), wrap=jax.jit(lambda block, x: block(x)))
    for model, args in [(linen, (variables, X)), (nnx_model, (X,))]:
        clean = linen.apply if model is linen else model
        before = np.asarray(clean(*args))
        list(ij.iterate(clean)(*args))  # a pass that knows of no modules
        for _ in range(2):
            names = []
            for _, name, value in (running := ij.iterate(ij.module_sites(model))(*args)):
                names.append(name)
                running.modified_value = jnp.zeros_like(value)
            assert len(names) == 6
            np.testing.assert_array_equal(running.retval, 0.0)
        np.testing.assert_array_equal(clean(*args), before)
        np.testing.assert_array_equal(ij.module_sites(model)(*args), before)


# Everything as it was


def test_classes_are_as_they_were_after_break_and_errors(model):
    own = Block.__call__, Model.__call__, nnx.Linear.__call__

    def is_clean():
        return own == (Block.__call__, Model.__call__, nnx.Linear.__call__)

    for _ in ij.iterate(ij.module_sites(model))(X):
        assert not is_clean()
        break
    assert is_clean()
    with pytest.raises(KeyError):
        for _ in ij.iterate(ij.module_sites(model))(X):
            raise KeyError
    assert is_clean()
    with pytest.raises(TypeError):
        ij.module_sites(model)()
    assert is_clean()

    class Inheriting(Block):
        pass

    inheriting = Inheriting(nnx.Rngs(0))
    assert [name for _, name, _ in ij.iterate(ij.module_sites(inheriting))(X)] == ["mlp", "Inheriting"]
    assert "__call__" not in vars(Inheriting)
    assert is_clean()


@pytest.mark.slow
def test_the_loops_body_may_call_the_same_model_and_loop_over_it(model, variables):
    for each, args in [(model, (X,)), (LinenModel(), (variables, X))]:
        plain = each if each is model else each.apply
        expected = plain(*args)
        count = 0
        for _ in ij.iterate(ij.module_sites(each))(*args):
            count += 1
            close(plain(*args), expected)
            assert len(list(ij.iterate(ij.module_sites(each))(*args))) == 6
            assert list(ij.iterate(plain)(*args)) == []
        assert count == 6


def test_threads_do_not_see_each_others_sites(model):
    counts = []

    def other():
        counts.append(len(list(ij.iterate(lambda x: ij.site(model(x), "end"))(X))))
        counts.append(len(list(ij.iterate(ij.module_sites(model))(X))))

    for _, name, _ in ij.iterate(ij.module_sites(model))(X):
        if name == "out":
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert counts == [1, 6]


@pytest.mark.slow
@pytest.mark.demo
def test_the_flax_llama_of_transformers():
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    llama = FlaxLlamaForCausalLM(config, seed=0)
    tokens = jnp.array([[1, 5, 9]])
    out, values = ij.fetch(ij.module_sites(llama))(tokens)
    params = llama.params
    embed = params["model"]["embed_tokens"]["embedding"][tokens]
    close(values[None, "model.embed_tokens"], embed)
    close(values[None, "lm_head"], out.logits)
    for layer in range(2):
        weights = params["model"]["layers"][str(layer)]["mlp"]
        x = values[layer, "model.layers.post_attention_layernorm"]
        gate = jax.nn.silu(x @ weights["gate_proj"]["kernel"])
        close(
            values[layer, "model.layers.mlp"],
            (gate * (x @ weights["up_proj"]["kernel"])) @ weights["down_proj"]["kernel"],
        )
    normed = values[None, "model.norm"]
    close(normed @ params["lm_head"]["kernel"], out.logits)
