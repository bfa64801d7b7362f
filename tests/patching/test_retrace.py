"""JAX traces anew what it traced before a patch, without any cache being cleared."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from interp_jax.patching import Patcher

pytestmark = pytest.mark.caches

SOURCE = """
import jax

traces = []

def g(x):
    traces.append(1)
    return x * 2

def loop(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: g(c), x)

f = jax.jit(g)

@jax.jit
def h(x):
    return g(x) + 1

@jax.checkpoint
def remat(x):
    return g(x)
"""


def test_jitted_functions_follow_the_patch_in_and_out(make_module):
    module = make_module(SOURCE)
    loop, remat, mine = jax.jit(module.loop), jax.jit(jax.grad(module.remat)), jax.jit(lambda x: module.h(x) * 10)
    x = jnp.float32(1)

    def values():
        return [float(fn(x)) for fn in (module.f, module.h, loop, remat, mine)]

    clean, patched = [2, 3, 8, 2, 30], [3, 4, 27, 3, 40]
    patcher = Patcher(module, g=["x * 2", "x * 3"])
    for _ in range(3):
        assert values() == clean
        with patcher:
            assert values() == patched
        assert values() == clean


def test_a_set_of_patches_seen_before_is_not_traced_again(make_module):
    module = make_module(SOURCE)
    patcher = Patcher(module, g=["x * 2", "x * 3"])
    x = jnp.float32(1)
    for _ in range(2):
        module.f(x)
        with patcher:
            module.f(x)
    traced = len(module.traces)
    for _ in range(3):
        module.f(x)
        with patcher:
            module.f(x)
    assert len(module.traces) == traced


def test_a_jitted_member_by_its_own_name(make_module):
    module = make_module(SOURCE)
    x = jnp.float32(1)
    assert float(module.f(x)) == 2
    with Patcher(module, f=["x * 2", "x * 5"]):
        assert float(module.f(x)) == 5
    with Patcher(module, h=["g(x) + 1", "g(x) + 7"]):
        assert float(module.h(x)) == 9
    assert (float(module.f(x)), float(module.h(x))) == (2, 3)


def test_what_one_patcher_made_is_not_taken_for_another_s(make_module):
    module = make_module(SOURCE)
    x = jnp.float32(1)
    for factor in range(3, 13):  # Each is gone before the next one comes, and may stand where it stood in memory.
        with Patcher(module, g=["x * 2", f"x * {factor}"]):
            assert float(module.f(x)) == factor


def test_a_patch_made_on_import_can_go(write_module, make_module):
    with Patcher(make_module(SOURCE), g=["x * 2", "x * 3"]):
        pass
    name = write_module(SOURCE)
    patcher = Patcher(name, g=["x * 2", "x * 3"])
    patcher.install_on_import()
    module = importlib.import_module(name)
    assert float(module.f(jnp.float32(1))) == 3
    patcher.uninstall()
    assert float(module.f(jnp.float32(1))) == 2


def test_a_patch_holds_in_other_threads(make_module):
    import concurrent.futures

    module = make_module(SOURCE)
    x = jnp.float32(1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert float(pool.submit(module.f, x).result()) == 2
        with Patcher(module, g=["x * 2", "x * 3"]):
            assert float(pool.submit(module.f, x).result()) == 3
        assert float(pool.submit(module.f, x).result()) == 2
