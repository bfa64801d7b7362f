"""Gradients with respect to activations, against adding a zero by hand and differentiating it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interp_jax as ij

LAYERS = 4
X = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(2, 4)
W = np.sin(np.arange(LAYERS * 16, dtype=np.float32)).reshape(LAYERS, 4, 4)


def block(x, w, site):
    out = site(jnp.tanh(x @ w), "mlp_out")
    return site(x + out, "resid_post")


def scanned(x, w, wrap=lambda function: function, **options):
    def body(x, w):
        x = block(x, w, ij.site)
        return x, x.sum()

    x, sums = ij.layer_scan(wrap(body), x, w, **options)
    return (ij.site(x, "final_norm") ** 3).sum() + (sums**2).sum()


def unrolled(x, w, wrap=lambda function: function, site=ij.site):
    sums = []
    for layer in range(len(w)):
        x = wrap(functools.partial(block, site=functools.partial(site, layer=layer)))(x, w[layer])
        sums.append(x.sum())
    return (site(x, "final_norm") ** 3).sum() + (jnp.stack(sums) ** 2).sum()


@functools.cache
def by_zeros():
    """Every gradient of the model: a zero added at each site, differentiated."""
    x, w = jnp.asarray(X), jnp.asarray(W)
    keys = [(layer, name) for layer in range(LAYERS) for name in ("mlp_out", "resid_post")] + [(None, "final_norm")]

    def objective(zeros):
        return unrolled(x, w, site=lambda value, name, layer=None: value + zeros[keys.index((layer, name))])

    value, gradients = jax.jit(jax.value_and_grad(objective))([jnp.zeros_like(x)] * len(keys))
    return value, dict(zip(keys, gradients, strict=True))


MODELS = {"unrolled": unrolled, "scanned": scanned}
WRAPS = {"plain": lambda function: function, "checkpoint": jax.checkpoint, "jit": jax.jit}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())


def close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), actual, expected)


@pytest.mark.caches  # those below are leak-checked, which takes five times as long
@models
@wraps
@pytest.mark.parametrize("layers", [None, 2, (1, 3)], ids=["all", "one", "two"])
def test_gradients(model, wrap, layers):
    value, expected = by_zeros()
    wanted = range(LAYERS) if layers is None else np.atleast_1d(layers).tolist()
    out, gradients = jax.jit(ij.gradients(functools.partial(model, wrap=wrap), layers=layers))(X, W)
    close(out, value)
    keys = [(layer, name) for layer in wanted for name in ("mlp_out", "resid_post")]
    assert list(gradients) == keys + [(None, "final_norm")] * (layers is None)
    close(list(gradients.values()), [expected[key] for key in gradients])


@models
def test_outside_jit(model):
    _, expected = by_zeros()
    _, gradients = ij.gradients(model, sites="resid_post", layers=(0, 3))(X, W)
    close(list(gradients.values()), [expected[0, "resid_post"], expected[3, "resid_post"]])


@pytest.mark.slow
def test_together_with_edits_from_a_pass_inside():
    def steered(fn, x, w):
        for layer, _, value in (running := ij.iterate(fn, sites="mlp_out", layers=(0, 2))(x, w)):
            running.modified_value = value * (2.0 + layer)
            del value
        return running.retval

    expected = ij.gradients(functools.partial(steered, unrolled), "resid_post", (1, 3))(X, W)
    actual = jax.jit(ij.gradients(functools.partial(steered, scanned), "resid_post", (1, 3)))(X, W)
    close(actual[0], expected[0])
    close(list(actual[1].values()), list(expected[1].values()))


@models
def test_a_model_that_differentiates_itself(model):
    def penalty(x, w):
        return (jax.grad(model)(x, w) ** 2).sum()

    keys = [(layer, "resid_post") for layer in range(LAYERS)]

    def by_zeros_of_penalty(zeros):
        def edited(value, name, layer=None):
            return value + zeros[layer] if name == "resid_post" else value

        return (jax.grad(lambda x: unrolled(x, W, site=edited))(X) ** 2).sum()

    expected = jax.jit(jax.grad(by_zeros_of_penalty))([jnp.zeros_like(X)] * LAYERS)
    _, gradients = jax.jit(ij.gradients(penalty, "resid_post"))(jnp.asarray(X), W)
    assert list(gradients) == keys
    close(list(gradients.values()), expected)


def one_site(x, site=lambda value: ij.site(value, "s")):
    return (site(jnp.sin(x)) ** 3).sum()


SELVES = {
    "jvp": lambda fn: lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1],
    "linearize": lambda fn: lambda x: jax.linearize(fn, x)[1](jnp.ones_like(x)),
    "hessian": lambda fn: lambda x: (jax.hessian(fn)(x) ** 2).sum(),
    "jacfwd": lambda fn: lambda x: (jax.jacfwd(fn)(x) ** 2).sum(),
}


@pytest.mark.caches
@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("differentiated", SELVES.values(), ids=SELVES.keys())
def test_a_model_that_differentiates_itself_forward(differentiated, around):
    def by_zero(zero):
        return differentiated(lambda x: one_site(x, lambda value: value + zero))(X[0])

    _, gradients = around(ij.gradients(differentiated(one_site)))(X[0])
    close(gradients[None, "s"], jax.grad(by_zero)(jnp.zeros_like(X[0])))


@pytest.mark.caches
@pytest.mark.parametrize("scanning", [jax.lax.scan, ij.layer_scan], ids=["scan", "layer_scan"])
def test_a_model_whose_scan_is_differentiated_forward(scanning):
    def model(x):
        return scanning(lambda x, _: (ij.site(jnp.sin(x), "s"), None), x, None, length=2)[0]

    def by_zeros(zeros):
        return SELVES["jvp"](lambda x: jnp.sin(jnp.sin(x) + zeros[0]) + zeros[1])(X[0]) @ X[1]

    _, gradients = jax.jit(ij.gradients(lambda x: SELVES["jvp"](model)(x) @ X[1]))(X[0])
    close(
        jnp.concatenate([value.reshape(-1, 4) for value in gradients.values()]), jax.grad(by_zeros)(jnp.zeros((2, 4)))
    )


@pytest.mark.caches
@pytest.mark.parametrize("differentiated", [SELVES["jvp"], jax.hessian], ids=["jvp", "hessian"])
def test_gradients_are_differentiated_forward(differentiated):
    def fetched(x):
        return ij.gradients(one_site)(x)[1][None, "s"].sum()

    close(differentiated(fetched)(X[0]), differentiated(lambda x: (3 * jnp.sin(x) ** 2).sum())(X[0]))


@pytest.mark.slow
@models
def test_gradients_are_differentiated_and_vmapped(model):
    def objective(x):
        _, gradients = ij.gradients(lambda x: model(x, W), "resid_post", 1)(x)
        return (gradients[1, "resid_post"] ** 2).sum()

    def by_zero(x):
        def edited(zero, value, name, layer=None):
            return value + zero if (layer, name) == (1, "resid_post") else value

        gradient = jax.grad(lambda zero: unrolled(x, W, site=functools.partial(edited, zero)))(jnp.zeros_like(x))
        return (gradient**2).sum()

    batch = jnp.stack([jnp.asarray(X), X * 0.5])
    expected = jax.jit(jax.vmap(jax.value_and_grad(by_zero)))(batch)
    close(jax.jit(jax.vmap(jax.value_and_grad(objective)))(batch), expected)


def test_in_a_bare_scan_the_gradients_are_stacked_over_the_iterations():
    def bare(x, w):
        x, _ = jax.lax.scan(lambda x, w: (block(x, w, ij.site), None), x, w)
        return (x**3).sum()

    def zeros(zeros):
        x, _ = jax.lax.scan(
            lambda x, each: (block(x, each[0], lambda v, name: v + each[1] * (name == "mlp_out")), None), X, (W, zeros)
        )
        return (x**3).sum()

    _, gradients = ij.gradients(bare, "mlp_out")(X, W)
    close(gradients[None, "mlp_out"], jax.jit(jax.grad(zeros))(jnp.zeros((LAYERS, *X.shape))))


def test_what_the_objective_does_not_depend_on_has_gradient_zero():
    def first_only(x, w):
        values = ij.fetch(scanned, "resid_post", 1)(x, w)[1]
        return values[1, "resid_post"].sum()

    _, gradients = ij.gradients(first_only, "mlp_out")(X, W)
    assert [bool(gradient.any()) for gradient in gradients.values()] == [True, True, False, False]


@pytest.mark.slow
def test_an_objective_of_what_the_function_returns():
    def forward(x, w):
        return {"out": scanned(x, w), "other": x.sum()}

    out, gradients = ij.gradients(forward, "mlp_out", 2, objective=lambda out: out["out"] * 2)(X, W)
    assert set(out) == {"out", "other"}
    close(gradients[2, "mlp_out"], 2 * by_zeros()[1][2, "mlp_out"])
    with pytest.raises(TypeError, match="objective="):
        ij.gradients(forward, "mlp_out", 2, objective=lambda out: out["out"][None])(X, W)


@pytest.mark.slow
def test_mistakes():
    with pytest.raises(ij.SiteError, match="did you mean 'mlp_out'"):
        ij.gradients(scanned, "mlp_uot")(X, W)
    with pytest.raises(ij.SiteError, match="int32"):
        ij.gradients(lambda tokens: ij.site(tokens, "tokens").sum() * 1.0)(jnp.arange(3))
    with pytest.raises(ij.ReapError, match="more than once"):
        ij.gradients(lambda x, w: unrolled(x, w) + unrolled(x * 2, w), "mlp_out")(X, W)
    with pytest.raises(ij.ReapError, match="first_layer"):
        ij.gradients(lambda x, w: scanned(x, w) + scanned(x * 2, w), "mlp_out")(X, W)


class Rematerialised(nnx.Module):
    """A layer that recomputes itself, as NNX has it: `nnx.remat` writes to the variables when it is done."""

    def __init__(self, w):
        self.w = nnx.Param(w)

    def block(self, x):
        return ij.site(jnp.tanh(x @ self.w[...]), "mlp_out")

    def __call__(self, x):
        return x + nnx.remat(Rematerialised.block)(self, x)


@pytest.mark.parametrize("around", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("split", [False, True], ids=["module", "state"])
def test_nnx_modules_that_rematerialise(around, split):
    model = Rematerialised(jnp.asarray(W[0]))
    graph, params = nnx.split(model)

    def forward(model, x):
        return ((nnx.merge(graph, model) if split else model)(x) ** 2).sum()

    _, gradients = around(ij.gradients(forward, "mlp_out"))(params if split else model, X)
    close(gradients[None, "mlp_out"], 2 * (X + np.tanh(X @ W[0])))


@pytest.mark.parametrize(
    "layer", [pytest.param(layer, marks=pytest.mark.slow) if layer else layer for layer in range(4)]
)
@pytest.mark.parametrize("inner", [lambda function: function, jax.checkpoint], ids=["plain", "checkpoint"])
def test_in_a_scan_of_scans(inner, layer):
    """JAX splits the inner scan by calls of functions, which every trace is asked for."""

    def model(x, w):
        def chunk(x, w):
            return ij.layer_scan(lambda x, w: (block(x, w, ij.site), None), x, w)

        x, _ = ij.layer_scan(inner(chunk), x, w.reshape(2, LAYERS // 2, 4, 4))
        return (x**3).sum()

    _, gradients = jax.jit(ij.gradients(model, "resid_post", layer))(X, W)
    x = X
    for w in W[: layer + 1]:
        x = x + jnp.tanh(x @ w)

    def rest(x):
        for w in W[layer + 1 :]:
            x = x + jnp.tanh(x @ w)
        return (x**3).sum()

    close(gradients[layer, "resid_post"], jax.grad(rest)(x))
