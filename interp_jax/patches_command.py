"""`interp-jax patches list | check | show`: what stands behind the command, and what it prints."""

import difflib
import sys

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from interp_jax import patching
from interp_jax.patching.installed_source import installed_version


def show_list(name: str | None) -> int:
    """Prints a table of the patch sets.

    Args:
        name: only this one; all if None.

    Returns:
        The exit status.
    """
    table = Table("set", "library", "known versions", "installed", "modules", "sites", "file", box=None, pad_edge=False)
    for each in _sets(name):
        pairs = [pair for module in each.modules.values() for pair in module]
        sites = {site for pair in pairs for site in pair.sites}
        table.add_row(
            each.name, each.distribution, each.versions, installed_version(each.distribution) or "no",
            str(len(each.modules)), str(len(sites)), str(each.path),
        )  # fmt: skip
    # A pipe has no width of its own; a path that is cut is of no use.
    Console(width=None if sys.stdout.isatty() else 400, soft_wrap=True).print(table)
    return 0


def check_sets(name: str | None) -> int:
    """Prints how sets fit what is installed.

    Args:
        name: only this one; all if None.

    Returns:
        1 if a set does not fit, or a set that was named is for a library that is not installed; else 0.
    """
    status = 0
    for each in _sets(name):
        report = patching.check(each)
        print(report)
        if not report.fits and (name is not None or report.installed is not None):
            status = 1
    return status


def show_diff(name: str | None) -> int:
    """Prints the unified diff of a library's source as a set patches it.

    Args:
        name: the set.

    Returns:
        The exit status.

    Raises:
        ValueError: no name was given.
    """
    if name is None:
        raise ValueError(f"Say which set to show: {', '.join(patching.known())}, or the path of a file.")
    patch_set = patching.load(name)
    lines: list[str] = []
    for module, (source, text) in patching.patched_texts(patch_set).items():
        path = module.replace(".", "/") + ".py"
        lines += difflib.unified_diff(
            source.text.splitlines(), text.splitlines(), f"a/{path}", f"b/{path}", lineterm=""
        )
    diff = "\n".join(lines)
    if sys.stdout.isatty():
        Console().print(Syntax(diff, "diff", theme="ansi_dark", word_wrap=True))
    else:
        print(diff)
    if patch_set.imports:
        print(f"With these names as globals: {'; '.join(patch_set.imports)}", file=sys.stderr)
    return 0


def _sets(name: str | None) -> list[patching.PatchSet]:
    return [patching.load(each) for each in ([name] if name is not None else patching.known())]
