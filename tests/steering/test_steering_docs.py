"""The examples of docs/steering.md run as they stand there, one after another, on the tiny model."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "steering.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not in an installed package")
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    # Three coefficients, two continuations, a norm: a text may hold line breaks.
    assert len(printed) >= 6
    assert printed[0].startswith("0.0 ")
    steered = names["steer"](
        names["language_model"], "The city", names["vector"], coefficients=(0.0, 2.0, -2.0), max_new_tokens=12
    )
    assert len({continuation.text for continuation in steered}) == 3
