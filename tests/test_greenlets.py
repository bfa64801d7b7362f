"""GreenletGenerator against plain generators, and its own rules: nesting, threads, unwinding."""

import collections.abc
import contextvars
import gc
import subprocess
import sys
import threading

import greenlet
import pytest

from interp_jax.greenlets import GreenletGenerator, InterleavingError, yield_


def deep(value, depth=5):
    return yield_(value) if depth == 0 else deep(value, depth - 1)


def test_yields_from_any_depth_and_returns():
    def body(start):
        return [deep(start), deep(start + 1), "end"]

    generator = GreenletGenerator(body, 10)
    assert isinstance(generator, collections.abc.Generator)
    assert next(generator) == 10
    assert generator.send("a") == 11
    with pytest.raises(StopIteration) as stop:
        generator.send("b")
    assert stop.value.value == ["a", "b", "end"]
    with pytest.raises(StopIteration):
        next(generator)


def test_yield_from_gets_the_return_value():
    def outer():
        result = yield from GreenletGenerator(lambda: (yield_(1), yield_(2)))
        yield result

    assert list(outer()) == [1, 2, (None, None)]


@pytest.mark.parametrize("value", [None, (), (1, 2), {"a": 1}, [None]])
def test_values_are_sent_and_yielded_as_themselves(value):
    generator = GreenletGenerator(lambda: yield_(yield_(value)))
    assert next(generator) is value
    assert generator.send(value) is value
    with pytest.raises(StopIteration) as stop:
        generator.send(value)
    assert stop.value.value is value


def test_sending_into_a_just_started_generator_is_the_plain_generators_error():
    with pytest.raises(TypeError, match="just-started"):
        GreenletGenerator(lambda: yield_(1)).send(5)


def test_throw_reaches_the_yield_and_can_be_caught():
    def body():
        try:
            yield_(1)
        except KeyError as error:
            return yield_(f"caught {error.args[0]}")

    generator = GreenletGenerator(body)
    next(generator)
    assert generator.throw(KeyError("k")) == "caught k"
    with pytest.raises(StopIteration):
        next(generator)


@pytest.mark.parametrize(
    "thrown", [(ValueError,), (ValueError("v"),), (ValueError, "v"), (ValueError, ValueError("v"))]
)
@pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature:DeprecationWarning")
def test_throw_uncaught_ends_the_generator(thrown):
    generator = GreenletGenerator(lambda: yield_(1))
    next(generator)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        generator.throw(*thrown)
    assert error.value.args == (() if thrown == (ValueError,) else ("v",))
    with pytest.raises(StopIteration):
        next(generator)


def test_throw_before_the_start_runs_nothing():
    ran = []
    generator = GreenletGenerator(lambda: ran.append(1))
    with pytest.raises(KeyError):
        generator.throw(KeyError("k"))
    assert ran == []
    with pytest.raises(StopIteration):
        next(generator)


def test_throwing_what_is_no_exception():
    generator = GreenletGenerator(lambda: yield_(1))
    next(generator)
    with pytest.raises(TypeError, match="deriving from BaseException"):
        generator.throw(5)  # pyright: ignore


def test_stop_iteration_inside_becomes_runtime_error():
    def body():
        yield_(1)
        raise StopIteration("inside")

    generator = GreenletGenerator(body)
    next(generator)
    with pytest.raises(RuntimeError, match="generator raised StopIteration") as error:
        next(generator)
    assert isinstance(error.value.__cause__, StopIteration)


def test_the_bodys_error_carries_the_bodys_frames():
    def failing_body():
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside") as error:
        next(GreenletGenerator(failing_body))
    assert "failing_body" in [entry.name for entry in error.traceback]


@pytest.mark.parametrize("leave", ["close", "del", "break", "error"])
def test_leaving_unwinds_the_body_at_once(leave):
    log = []

    def body():
        try:
            while True:
                yield_(1)
        finally:
            log.append("unwound")

    gc.disable()  # the last reference alone must do it
    try:
        if leave == "close":
            generator = GreenletGenerator(body)
            next(generator)
            generator.close()
            generator.close()
        elif leave == "del":
            generator = GreenletGenerator(body)
            next(generator)
            del generator
        elif leave == "break":
            for _ in GreenletGenerator(body):
                break
        else:
            with pytest.raises(KeyError):
                for _ in GreenletGenerator(body):
                    raise KeyError
    finally:
        gc.enable()
    assert log == ["unwound"]


def test_closing_raises_greenlet_exit_inside_and_nothing_outside():
    seen = []

    def body():
        try:
            yield_(1)
        except BaseException as error:
            seen.append(type(error))
            raise

    generator = GreenletGenerator(body)
    next(generator)
    generator.close()
    assert seen == [greenlet.GreenletExit]


def test_a_body_that_yields_while_it_is_closed_is_an_error_and_is_unwound_all_the_same():
    log = []

    def body():
        try:
            try:
                yield_(1)
            except greenlet.GreenletExit:
                yield_(2)
        finally:
            log.append("unwound")

    generator = GreenletGenerator(body)
    next(generator)
    with pytest.raises(RuntimeError, match="ignored GreenletExit"):
        generator.close()
    assert log == ["unwound"]


def test_an_error_while_closing_surfaces():
    def body():
        try:
            yield_(1)
        finally:
            raise KeyError("cleanup")

    generator = GreenletGenerator(body)
    next(generator)
    with pytest.raises(KeyError, match="cleanup"):
        generator.close()


def test_context_variables_are_inherited_as_a_copy():
    variable = contextvars.ContextVar("variable")
    variable.set("outside")

    def body():
        yield_(variable.get())
        variable.set("inside")
        yield_(variable.get())

    generator = GreenletGenerator(body)
    assert next(generator) == "outside"
    assert next(generator) == "inside"
    assert variable.get() == "outside"


def test_one_inside_another_and_one_between_two_steps_of_another():
    def inner(name):
        return [yield_(f"{name}{i}") for i in range(2)]

    def outer():
        for value in GreenletGenerator(inner, "x"):
            yield_(("outer saw", value))

    seen = []
    for value in GreenletGenerator(outer):
        seen.append(value)
        seen.extend(GreenletGenerator(inner, "y"))
    assert seen == [("outer saw", "x0"), "y0", "y1", ("outer saw", "x1"), "y0", "y1"]


def test_yielder_reaches_an_outer_generator_from_an_inner_body():
    log = []

    def inner(to_outer):
        try:
            yield_("inner 1")
            log.append(to_outer("straight to outer"))
            yield_("inner 2")
        finally:
            log.append("inner unwound")

    def outer():
        for value in GreenletGenerator(inner, generator.yielder()):
            yield_(value)

    generator = GreenletGenerator(outer)
    assert next(generator) == "inner 1"
    assert next(generator) == "straight to outer"
    assert generator.send("answer") == "inner 2"
    assert log == ["answer"]
    generator.close()
    assert log == ["answer", "inner unwound"]


def test_interleaving_is_refused_and_both_are_unwound_youngest_first():
    log = []

    def body(name):
        try:
            yield_(1)
            yield_(2)
        finally:
            log.append(name)

    with pytest.raises(InterleavingError, match="stepped in turns"):
        for _ in zip(GreenletGenerator(body, "old"), GreenletGenerator(body, "young"), strict=True):
            pass
    assert log == ["young", "old"]
    assert list(GreenletGenerator(body, "new")) == [1, 2]


def test_closing_an_old_one_closes_the_younger_first():
    log = []

    def body(name):
        try:
            yield_(name)
        finally:
            log.append(name)

    old, young = GreenletGenerator(body, "old"), GreenletGenerator(body, "young")
    next(old), next(young)
    old.close()
    assert log == ["young", "old"]
    with pytest.raises(StopIteration):
        next(young)


def test_a_step_from_inside_its_own_body():
    generator = GreenletGenerator(lambda: next(generator))
    with pytest.raises(ValueError, match="already executing"):
        next(generator)


def test_one_loop_a_thread_and_none_across():
    results = {}

    def loop(name):
        results[name] = list(GreenletGenerator(lambda: [yield_((name, i)) for i in range(50)]))

    threads = [threading.Thread(target=loop, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [(name, i) for i in range(50)] for name in "abcd"}

    generator = GreenletGenerator(lambda: [yield_(i) for i in range(3)])
    next(generator)
    errors = []

    def step():
        try:
            next(generator)
        except InterleavingError as error:
            errors.append(str(error))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "another thread" in errors[0]
    assert next(generator) == 1


def test_yield_outside_a_body():
    with pytest.raises(RuntimeError, match="outside the body"):
        yield_(1)


def test_no_jax_is_imported():
    code = "import sys, interp_jax, interp_jax.greenlets; assert not [m for m in sys.modules if m.startswith('jax')]"
    subprocess.run([sys.executable, "-c", code], check=True)
