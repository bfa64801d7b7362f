"""Tests of patch sets for libraries that need an environment of their own: `make test-patches`.

Each file tests one library and is collected only where that library is installed.
"""

import importlib.util
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for patch_set_contract

LIBRARIES = {
    "test_gemma.py": "gemma",
    "test_tunix.py": "tunix",
    "test_penzai.py": "penzai",
    "test_levanter.py": "levanter",
}

collect_ignore = [file for file, package in LIBRARIES.items() if importlib.util.find_spec(package) is None]
