"""Settings for every test: one CPU platform, a compiler in a hurry, and JAX's leak checker on.

**The compiler.** Nearly all the time of the fast tests was XLA's, on programs that run once on a few numbers. So they
are compiled without optimisation, unless `XLA_FLAGS` is set, be it to nothing: `make test-slow` does so, as its tests
compute for minutes. Tests of several devices start processes with flags of their own.

What has been compiled goes to a folder that lasts as long as the process, for the leak checker has the same small
operation compiled over and over. The folder is the process's own: another one might read an entry half written.

**The leak checker.** A tracer that outlives its trace fails a test. This costs dear in two ways. It bypasses JAX's
trace caches, so each call of a small operation is traced and compiled anew: a test marked `caches` goes without it, and
so do all of the packages that know arrays only, never a model, where no code of ours stands between JAX and a function.
And at most traces it collects garbage and looks through every object that there is, so it is shown only what is newer
than the test, which a tracer that leaks in it is. What was there before is frozen: the collector then does not see it.
Nor would the patcher, which asks the collector for the functions that a patch concerns; in its tests nothing is frozen.
"""

import gc
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

IN_A_HURRY = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# Later ones have no such flag, and XLA ends the process at a flag that it does not know.
if jax.__version_info__ < (0, 11):
    IN_A_HURRY.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(IN_A_HURRY))  # read when the first program is compiled

COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

HERE = pathlib.Path(__file__).parent
ARRAYS_ONLY = [HERE / "pursuit", HERE / "sae"]


def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        if any(folder in item.path.parents for folder in ARRAYS_ONLY):
            item.add_marker("caches")


@pytest.fixture(autouse=True)
def _leaks_are_checked(request: pytest.FixtureRequest):
    """A leaked tracer fails a test, unless it is marked `caches`."""
    if request.node.get_closest_marker("caches"):
        yield
        return
    if HERE / "patching" not in request.path.parents:
        gc.freeze()
    try:
        with jax.check_tracer_leaks(True):
            yield
    finally:
        gc.unfreeze()


@pytest.fixture
def without_type_checks():
    """For tests of what a user is told who passes another type: nobody else has a type checker on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
