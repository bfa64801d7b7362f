"""The command line, as a person types it: in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from interp_jax.models.from_files import save_language_model
from interp_jax.models.generation import generate
from interp_jax.models.tiny import load_tiny


def run(*arguments, expect=0):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "interp_jax.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == expect, result.stderr
    return result


def test_help_names_the_commands_and_imports_no_jax():
    text = run("--help").stdout
    for command in ("demo", "data", "sites", "generate", "model", "patches"):
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


def test_generate_continues_each_prompt():
    prompts = ["The city is one of the largest", "In 1914 the"]
    result = run("generate", *prompts, "--model", "tiny", "--max-new-tokens", "6")
    tiny = load_tiny()
    texts = generate(tiny, prompts, max_new_tokens=6).texts()
    expected = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    assert result.stdout == "\n".join(expected) + "\n"
    assert "Loading tiny" in result.stderr
    error = run("generate", "--model", "tiny", expect=1).stderr
    assert error == "ValueError: Give one prompt or more to continue.\n"
    error = run("generate", "", "--model", "tiny", expect=1).stderr.splitlines()[-1]
    assert error.startswith("ValueError: The prompt '' has no token to continue from")


@pytest.mark.slow
def test_model_tells_what_it_is_and_finds_nans(tmp_path):
    text = run("model", "tiny", "--check").stdout
    assert "1,066,112; 0.0043 GB in float32" in text
    assert "<|endoftext|> (0)" in text
    assert text.endswith("Every tensor is there, has its shape and is finite.\n")
    tiny = load_tiny()
    tiny.params.final_norm.scale[...] = tiny.params.final_norm.scale[...].at[3].set(np.nan)
    save_language_model(tiny, tmp_path / "broken")
    text = run("model", str(tmp_path / "broken"), "--check", expect=1).stdout
    assert text.endswith("final_norm.scale holds 1 values that are not finite.\n")
    (tmp_path / "broken" / "tokenizer.json").unlink()
    assert "none that can be used" in run("model", str(tmp_path / "broken")).stdout


def test_data_status_tells_of_each_file():
    lines = run("data", "status").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["smollm2", "wikipedia", "gemma3"]


@pytest.mark.parametrize("arguments", [("data", "get", "nothing"), ("dance",)])
def test_what_does_not_exist_is_said_so(arguments):
    result = run(*arguments, expect=2)
    assert arguments[-1] in result.stdout + result.stderr
