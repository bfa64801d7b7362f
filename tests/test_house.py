"""The house: each floor imports only from floors below it, and the lowest do without JAX."""

import ast
import pathlib
import subprocess
import sys

import pytest

import interp_jax

PACKAGE = pathlib.Path(interp_jax.__file__).parent

# From the ground up. Modules on one floor may not import each other's, but for those of their own package.
FLOORS = [
    {"greenlets", "patching", "installed_data", "progress", "whole_file", "disk_room"},
    {"instrument"},
    {"models", "sae", "pursuit"},
    {"activations"},
    {"steering", "attribution"},
    {"report"},
    {
        "demo",
        "train_tiny",
        "patches_command",
        "model_command",
        "sae_command",
        "pursue_command",
        "attribute_command",
        "steer_command",
    },
    {"cli"},
]
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}
SAME_FLOOR_ALLOWED = {("patching", "whole_file"), ("installed_data", "whole_file")}


def place(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "interp_jax" and len(parts) > 1 and parts[1] in FLOOR_OF:
                yield parts[1]


def test_every_module_has_a_floor():
    places = {place(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert places == set(FLOOR_OF)


def test_imports_go_downward_only():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        here = place(path)
        if here == "__init__":
            continue
        for there in set(imports(path)) - {here}:
            is_below = FLOOR_OF[there] < FLOOR_OF[here]
            if not is_below and (here, there) not in SAME_FLOOR_ALLOWED:
                upward.append(f"{path.relative_to(PACKAGE)} imports {there}")
    assert upward == []


def test_importing_the_package_imports_next_to_nothing():
    code = (
        "import sys, interp_jax\n"
        "heavy = {'jax', 'flax', 'numpy', 'tyro', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'iterate' in dir(interp_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_patching_and_greenlets_do_without_jax():
    code = (
        "import sys, interp_jax.patching, interp_jax.greenlets, interp_jax.installed_data\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib', 'flax')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in interp_jax.__all__:
        assert getattr(interp_jax, name) is not None


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(AttributeError, match="iterate"):
        _ = interp_jax.itarate
