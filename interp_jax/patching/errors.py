"""What can go wrong with a patch, one class each, so that a caller can tell them apart.

Each message states what was found, what was expected and what to do next.
"""


class PatchError(Exception):
    """A patch could not be made, applied or taken back. Nothing is left half applied."""


class PatternSyntaxError(PatchError):
    """A `before` or an `after` is not Python (with metavariables)."""


class MatchError(PatchError):
    """A `before` matches too few or too many places."""


class ConflictError(PatchError):
    """Two pairs want to rewrite the same code, or two patchers need different things under one name."""


class MemberError(PatchError):
    """A member does not exist, or is not written in Python in that module."""


class SourceError(PatchError):
    """A module's source text cannot be found, or is not what is running."""


class AlreadyImportedError(PatchError):
    """Patching on import was asked for after the import."""


class DefinitionError(PatchError):
    """A change outside function bodies cannot be made in place once the module has run."""


class UnknownPatchSetError(PatchError):
    """No patch set has that name."""


class PatchSetError(PatchError):
    """A patch set's file is not what a patch set must be."""
