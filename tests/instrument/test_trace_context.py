"""What the package asks of JAX's insides: each of these fails plainly when JAX moves."""

import jax
import jax.extend.core
import jax.numpy as jnp

from interp_jax.instrument import harvest


def test_a_harvest_passes_for_the_trace_around_it():
    before = jax.extend.core.get_opaque_trace_state()
    with harvest.reaping("t"):
        within = jax.extend.core.get_opaque_trace_state()
        other = jax.jit(lambda: jax.extend.core.get_opaque_trace_state() == within)
        assert within == before
        assert not other()


def test_a_value_knows_the_trace_that_it_belongs_to():
    def inner(x):
        with jax.extend.core.take_current_trace() as trace:
            pass
        assert x._trace is trace
        return x

    jax.jit(inner)(jnp.ones(2))
