"""Data files inside installed packages: found without an import, and got through the real installers."""

import base64
import dataclasses
import hashlib
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from interp_jax import installed_data
from interp_jax.installed_data import DATA, DataFile, MissingDataError, Part

CONTENT = b"the whole of a small data file\n"
ROOT = pathlib.Path(installed_data.__file__).parents[1]
SMALL = DataFile(
    name="small",
    description="small file",
    package="interp-jax-small-data",
    version="1.0",
    path="interp_jax_small_data/file.bin",
    n_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="CC0",
)


# The same content, in three parts; the first package holds none of it.
PARTED = dataclasses.replace(
    SMALL,
    name="parted",
    description="file in parts",
    package="interp-jax-parted-data",
    path="interp_jax_parted_data/file.bin",
    parts=tuple(Part(f"interp-jax-parted-data{i}", f"interp_jax_parted_data{i}/part.bin") for i in range(3)),
)
PIECES = (CONTENT[:10], CONTENT[10:11], CONTENT[11:])


def _wheel(
    folder: pathlib.Path, content: bytes = CONTENT, package: str = SMALL.package, path: str = SMALL.path
) -> pathlib.Path:
    """A wheel whose package fails on import and asks for a dependency that does not exist."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n"
    files = {
        f"{name}/__init__.py": b"raise RuntimeError('this package must not be imported')\n",
        path: content,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for inside, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{inside},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for inside, data in files.items():
            wheel.writestr(inside, data)
    return file


def _parted_wheels(folder: pathlib.Path, pieces: tuple[bytes, ...] = PIECES) -> list[pathlib.Path]:
    parts = [_wheel(folder, piece, part.package, part.path) for piece, part in zip(pieces, PARTED.parts, strict=True)]
    return [_wheel(folder, b"terms", PARTED.package, "interp_jax_parted_data/TERMS"), *parts]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(DATA, "small", SMALL)


@pytest.fixture
def parted(monkeypatch):
    monkeypatch.setitem(DATA, "parted", PARTED)


@pytest.fixture
def site(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder on sys.path to unpack wheels into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    return folder


def _unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    importlib.invalidate_caches()


def test_a_file_is_found_without_importing_its_package(small, site, tmp_path):
    _unpack(_wheel(tmp_path), site)
    assert installed_data.find("small").read_bytes() == CONTENT
    assert "interp_jax_small_data" not in sys.modules
    (entry,) = installed_data.status("small")
    assert (entry.path, entry.problem) == (site / SMALL.path, None)


@pytest.fixture
def no_installer(monkeypatch):
    def fail():
        raise AssertionError("nothing may be installed")

    monkeypatch.setattr(installed_data, "_installer", fail)


def test_parts_that_are_there_are_joined_without_installing_anything(parted, site, tmp_path, no_installer):
    for wheel in _parted_wheels(tmp_path):
        _unpack(wheel, site)
    with pytest.raises(MissingDataError, match=r"File in parts: not installed; run `interp-jax data get parted`\."):
        installed_data.find("parted")
    assert installed_data.get("parted") == installed_data.find("parted") == site / PARTED.path
    assert (site / PARTED.path).read_bytes() == CONTENT
    (site / PARTED.path).write_bytes(CONTENT.upper())
    assert installed_data.status("parted")[0].path is None
    assert installed_data.get("parted").read_bytes() == CONTENT
    assert sorted(file.name for file in (site / PARTED.path).parent.iterdir()) == ["TERMS", "__init__.py", "file.bin"]
    assert not [name for name in sys.modules if name.startswith("interp_jax_parted")]


@pytest.mark.parametrize(
    "pieces",
    [(CONTENT[:10], b"", CONTENT[11:]), (CONTENT[:10], b"?", CONTENT[11:]), (PIECES[1], PIECES[0], PIECES[2])],
    ids=["short", "wrong", "in another order"],
)
def test_parts_that_do_not_make_the_file_leave_nothing(parted, site, tmp_path, monkeypatch, pieces):
    for wheel in _parted_wheels(tmp_path, pieces):
        _unpack(wheel, site)
    monkeypatch.setattr(installed_data, "_installer", lambda: ["true"])  # Changes nothing.
    with pytest.raises(
        MissingDataError, match=r"were installed, and yet their parts do not make the file .* of 31 bytes"
    ):
        installed_data.get("parted")
    assert sorted(file.name for file in (site / PARTED.path).parent.iterdir()) == ["TERMS", "__init__.py"]


@pytest.mark.parametrize("name", [pytest.param("smollm2", marks=pytest.mark.demo), "wikipedia", "gemma3"])
def test_the_real_files_are_whole(name):
    if name == "gemma3" and installed_data.status(name)[0].path is None:
        pytest.skip("Only the tests of patch sets need it: `make test-patches` gets it.")
    (entry,) = installed_data.status(name)
    assert entry.problem is None
    assert installed_data.get(name) == entry.path == installed_data.find(name)


def test_what_is_missing_names_the_command_in_one_line(small):
    with pytest.raises(MissingDataError) as caught:
        installed_data.find("small")
    assert str(caught.value) == "Small file: not installed; run `interp-jax data get small`."
    (entry,) = installed_data.status("small")
    assert (entry.path, entry.problem) == (None, str(caught.value))


def test_a_file_cut_short_or_changed_is_not_taken_for_whole(small, site, tmp_path):
    _unpack(_wheel(tmp_path), site)
    (site / SMALL.path).write_bytes(CONTENT[:-3])
    with pytest.raises(MissingDataError, match=r"has 28 bytes, expected 31; .*`interp-jax data get small`"):
        installed_data.find("small")
    (site / SMALL.path).write_bytes(CONTENT.upper())
    (entry,) = installed_data.status("small")
    assert entry.path is None
    assert "wrong checksum" in str(entry.problem)


def test_an_unknown_name_lists_the_known_ones():
    for function in (installed_data.find, installed_data.get, installed_data.status):
        with pytest.raises(ValueError, match="no data file 'gpt5'; there are gemma3, smollm2, wikipedia"):
            function("gpt5")


def _environment(tmp_path: pathlib.Path, *, with_pip: bool) -> pathlib.Path:
    subprocess.run(
        [sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), tmp_path / "venv"], check=True
    )
    return tmp_path / "venv" / "bin" / "python"


def _get(
    python: pathlib.Path, wheels: pathlib.Path, path: str, data: DataFile = SMALL
) -> subprocess.CompletedProcess[str]:
    """Runs `get` in another environment, offline: the wheels are the only ones that the installers can see."""
    program = (
        "import sys; from interp_jax import installed_data as d; from interp_jax.installed_data import *\n"
        f"d.DATA[{data.name!r}] = {data!r}\n"
        f"try: print(d.get({data.name!r}).read_bytes())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "packages = {'interp_jax_small_data', 'interp_jax_parted_data'}\n"
        "print('imported' if packages & set(sys.modules) else 'not imported')\n"
    )
    (wheels / "uv.toml").write_text(f'no-index = true\nfind-links = ["{wheels}"]\n')
    offline = {
        "PYTHONPATH": str(ROOT),
        "PATH": path,
        "HOME": str(wheels),
        "UV_CONFIG_FILE": str(wheels / "uv.toml"),
        "UV_CACHE_DIR": str(wheels / "cache"),
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    return subprocess.run([python, "-c", program], env=offline, capture_output=True, text=True, check=True)


@pytest.fixture
def uv() -> str:
    beside = pathlib.Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        pytest.skip("uv is not installed")
    return str(pathlib.Path(found).parent)


def test_get_installs_with_uv_and_mends_a_damaged_file(tmp_path, uv):
    _wheel(tmp_path)
    python = _environment(tmp_path, with_pip=False)
    assert _get(python, tmp_path, uv).stdout == f"{CONTENT!r}\nnot imported\n"
    (file,) = (tmp_path / "venv").rglob("file.bin")
    file.unlink()  # First, since uv may have linked it to its cache.
    file.write_bytes(CONTENT[:5])
    assert _get(python, tmp_path, uv).stdout == f"{CONTENT!r}\nnot imported\n"


def test_get_installs_all_packages_of_a_file_in_parts(tmp_path, uv):
    _parted_wheels(tmp_path)
    python = _environment(tmp_path, with_pip=False)
    assert _get(python, tmp_path, uv, PARTED).stdout == f"{CONTENT!r}\nnot imported\n"
    (part,) = (tmp_path / "venv").rglob("interp_jax_parted_data1/part.bin")
    (whole,) = (tmp_path / "venv").rglob("file.bin")
    for file in (part, whole):
        file.unlink()
        file.write_bytes(b"?")
    assert _get(python, tmp_path, uv, PARTED).stdout == f"{CONTENT!r}\nnot imported\n"


@pytest.mark.slow
def test_get_installs_with_pip_where_there_is_no_uv(tmp_path):
    _wheel(tmp_path)
    python = _environment(tmp_path, with_pip=True)
    assert _get(python, tmp_path, "").stdout == f"{CONTENT!r}\nnot imported\n"


def test_get_says_why_it_failed(tmp_path, uv):
    python = _environment(tmp_path, with_pip=False)
    assert "RuntimeError Neither uv nor pip was found" in _get(python, tmp_path, "").stdout
    failed = _get(python, tmp_path, uv).stdout
    assert "RuntimeError `" in failed
    assert "failed with exit status" in failed
    assert "interp-jax-small-data" in failed
    _wheel(tmp_path, content=b"something else")
    assert "MissingDataError interp-jax-small-data==1.0 was installed, and yet" in _get(python, tmp_path, uv).stdout
