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
from interp_jax.installed_data import DATA, DataFile, MissingDataError

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


def _wheel(folder: pathlib.Path, content: bytes = CONTENT) -> pathlib.Path:
    """A wheel whose package fails on import and asks for a dependency that does not exist."""
    info = "interp_jax_small_data-1.0.dist-info"
    files = {
        "interp_jax_small_data/__init__.py": b"raise RuntimeError('this package must not be imported')\n",
        SMALL.path: content,
        f"{info}/METADATA": (
            b"Metadata-Version: 2.1\nName: interp-jax-small-data\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n"
        ),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    path = folder / "interp_jax_small_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(DATA, "small", SMALL)


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


@pytest.mark.parametrize("name", [pytest.param("smollm2", marks=pytest.mark.demo), "wikipedia"])
def test_the_real_files_are_whole(name):
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


def _get(python: pathlib.Path, wheels: pathlib.Path, path: str) -> subprocess.CompletedProcess[str]:
    """Runs `get` in another environment, offline: the wheel is the only one that the installers can see."""
    fields = dataclasses.asdict(SMALL)
    program = (
        "import sys; from interp_jax import installed_data as d\n"
        f"d.DATA['small'] = d.DataFile(**{fields!r})\n"
        "try: print(d.get('small').read_bytes())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('imported' if 'interp_jax_small_data' in sys.modules else 'not imported')\n"
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
