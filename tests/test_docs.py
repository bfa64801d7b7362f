"""Every Python block of the README and of the docs runs, page by page, in the order in which a reader types it."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A page says in a comment what its examples need beyond the package.
NEEDS = {
    "<!-- needs: make demo -->": [pytest.mark.slow, pytest.mark.demo],
    "<!-- needs: transformers -->": [pytest.mark.demo],
    "<!-- needs: a minute -->": [pytest.mark.slow],
}


def cases():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if BLOCK.search(text):
            marks = [mark for needs, marks in NEEDS.items() if needs in text for mark in marks]
            yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.mark.caches
@pytest.mark.parametrize("page", list(cases()))
def test_the_pages_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text[: match.start(1)].count("\n")
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)


def test_the_docs_name_no_page_that_is_missing():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
