"""The code that a pattern most nearly matches, shown as a diff: what to look at when upstream has moved."""

import ast
import difflib
from collections.abc import Iterator, Sequence

from interp_jax.patching.pattern import Pattern
from interp_jax.patching.source_text import SourceText


def nearest_as_diff(source: SourceText, roots: Sequence[ast.stmt], pattern: Pattern, *, is_expression: bool) -> str:
    """The difference between a pattern and the most similar code of its kind.

    Args:
        source: the module.
        roots: the definitions to look in.
        pattern: what was looked for.
        is_expression: compare with expressions; otherwise with as many statements in a row as the pattern has.

    Returns:
        A diff with `-` for the pattern and `+` for the source, and the source's line; or a sentence if there is nothing
        to show.
    """
    best = ""
    line = 0
    score = 0.0
    wanted = "".join(pattern.text.split())
    for start, end in _candidates(source, roots, len(pattern.body), is_expression=is_expression):
        text = source.text[start:end]
        matcher = difflib.SequenceMatcher(None, wanted, "".join(text.split()), autojunk=False)
        if matcher.real_quick_ratio() > score and matcher.quick_ratio() > score and matcher.ratio() > score:
            score, best, line = matcher.ratio(), text, source.line_at(start)
    if score < 0.3:
        return "nothing similar"
    lead = min((len(s) - len(s.lstrip()) for s in best.split("\n")[1:] if s.strip()), default=0)
    shown = [s[lead:] if i else s for i, s in enumerate(best.split("\n"))]
    marked = [s for s in difflib.ndiff(pattern.text.split("\n"), shown) if not s.startswith("?")]
    return f"line {line}:\n" + "\n".join(marked)


def _candidates(
    source: SourceText, roots: Sequence[ast.stmt], length: int, *, is_expression: bool
) -> Iterator[tuple[int, int]]:
    for root in roots:
        for node in ast.walk(root):
            if is_expression and isinstance(node, ast.expr):
                yield source.span(node)
            for _, block in ast.iter_fields(node):
                if not is_expression and isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    for start in range(max(1, len(block) - length + 1)):
                        yield source.span(block[start])[0], source.span(block[start : start + length][-1])[1]
