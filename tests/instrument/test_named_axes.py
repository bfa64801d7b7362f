"""Named arrays at sites, on stand-ins with the attributes that the libraries' own have."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.instrument.named_axes import named_site

SIZES = {"batch": 2, "seq": 3, "groups": 2, "queries": 4, "d": 5}


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LikeHaliax:
    array: jax.Array
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})

    @property
    def axis_names(self):
        return [axis.name for axis in self.axes]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LikePenzai:
    data_array: jax.Array
    named_axes: collections.OrderedDict = dataclasses.field(metadata={"static": True})

    def with_positional_prefix(self):
        return self

    @property
    def array(self):
        return self.data_array

    @property
    def axis_names(self):
        return list(self.named_axes)


def like_haliax(array, *names):
    return LikeHaliax(array, tuple(map(Axis, names, array.shape)))


def like_penzai(array, *names):
    return LikePenzai(array, collections.OrderedDict(zip(names, array.shape, strict=True)))


@pytest.fixture(params=[like_haliax, like_penzai])
def named(request):
    def make(*names):
        shape = [SIZES[name] for name in names]
        return request.param(jnp.arange(float(np.prod(shape))).reshape(shape), *names)

    return make


def _seen(value, *axes):
    _, values = ij.fetch(lambda value: named_site(value, "here", *axes, layer=1))(value)
    return values[1, "here"]


def test_the_axes_come_in_the_order_asked_for_and_all_others_before_them(named):
    value = named("d", "seq", "batch", "groups")
    np.testing.assert_array_equal(_seen(value, "seq", "groups", "d"), jnp.einsum("dsbg->bsgd", value.array))
    np.testing.assert_array_equal(_seen(value), value.array)


def test_joined_axes(named):
    value = named("queries", "d", "seq", "batch", "groups")
    expected = jnp.einsum("qdsbg->bsgqd", value.array).reshape(2, 3, 8, 5)
    np.testing.assert_array_equal(_seen(value, "seq", ("groups", "queries"), "d"), expected)


def test_joined_axes_of_which_some_or_all_are_absent(named):
    heads = ("groups", "queries")
    assert _seen(named("groups", "seq", "d"), "seq", heads, "d").shape == (3, 2, 5)
    assert _seen(named("batch", "d", "seq"), "seq", heads, "d").shape == (2, 3, 1, 5)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_edit_lands_where_it_was_made_and_the_order_of_the_axes_stays(named, compiled):
    value = named("queries", "d", "seq", "batch", "groups")

    def edited(value):
        for _, _, seen in (running := ij.iterate(named_site)(value, "here", "seq", ("groups", "queries"), "d")):
            running.modified_value = seen.at[1, 2, 6, 3].set(-1.0)
        return running.retval

    out = (jax.jit(edited) if compiled else edited)(value)
    assert out.axis_names == value.axis_names
    # Head 6 is group 1, query 2.
    np.testing.assert_array_equal(out.array, value.array.at[2, 3, 2, 1, 1].set(-1.0))


def test_with_nothing_listening_and_where_nothing_is_changed_the_same_object_comes_back(named):
    value = named("d", "seq")
    assert named_site(value, "here", "seq", "d") is value
    assert named_site("no array at all", "here", "seq") == "no array at all"
    assert str(jax.make_jaxpr(lambda v: named_site(v, "here", "seq", "d"))(value)).count("\n") == 0
    for _ in (running := ij.iterate(lambda: named_site(value, "here", "seq", "d"))()):
        pass
    assert running.retval is value


def test_axes_without_a_name_stand_first():
    value = LikePenzai(jnp.arange(30.0).reshape(2, 3, 5), collections.OrderedDict(seq=3, d=5))
    np.testing.assert_array_equal(_seen(value, "d", "seq"), value.array.swapaxes(1, 2))


def test_an_axis_that_is_not_there_is_an_error_that_names_those_that_are(named):
    with pytest.raises(ij.SiteError, match=r"'here' wants the axes \('sequence', 'd'\).*\('seq', 'd'\)"):
        _seen(named("seq", "d"), "sequence", "d")
    with pytest.raises(ij.SiteError, match="each once"):
        _seen(named("seq", "d"), "d", "d")


def test_what_is_no_named_array_is_an_error():
    with pytest.raises(ij.SiteError, match="no named array"):
        _seen(jnp.ones(3), "seq")
