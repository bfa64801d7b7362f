"""The command line, as a person types it: in a process of its own."""

import subprocess
import sys

import pytest


def run(*arguments, expect=0):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "interp_jax.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == expect, result.stderr
    return result


def test_help_names_the_commands_and_imports_no_jax():
    text = run("--help").stdout
    for command in ("demo", "data", "sites", "patches"):
        assert command in text
    code = "import sys; sys.argv = ['interp-jax', '--help']\nimport interp_jax.cli\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sites_of_the_tiny_model():
    lines = run("sites", "tiny", "--layer", "1").stdout.splitlines()
    assert lines[0].split() == ["layer", "site", "shape", "dtype"]
    assert lines[1].split() == ["1", "resid_pre", "(1,", "128,", "128)", "float32"]
    assert {line.split()[0] for line in lines[1:]} == {"1"}


def test_a_layer_that_does_not_exist():
    error = run("sites", "tiny", "--layer", "9", expect=1).stderr
    assert error.startswith("ValueError: tiny has no layer 9; its layers are 0 to 3")
    assert len(error.splitlines()) == 1


def test_data_status_tells_of_each_file():
    lines = run("data", "status").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["smollm2", "wikipedia", "gemma3"]


@pytest.mark.parametrize("arguments", [("data", "get", "nothing"), ("dance",)])
def test_what_does_not_exist_is_said_so(arguments):
    result = run(*arguments, expect=2)
    assert arguments[-1] in result.stdout + result.stderr
