"""Levanter's modules, without what the package loads first.

`levanter/__init__.py` imports the trainer, and with it ray, wandb and the data pipeline. The models need none of that.
This package stands before the installed one and takes its modules from there: `levanter.models.llama` is the library's
own. Two of these modules name types of `pyarrow` and `datasets`, 200 MB, in signatures; they get empty modules.
"""

import importlib.machinery
import pathlib
import sys
import types

_own = pathlib.Path(__file__).parent
_elsewhere = [entry for entry in sys.path if pathlib.Path(entry).resolve() != _own.parent]
_installed = importlib.machinery.PathFinder.find_spec("levanter", _elsewhere)
if _installed is None:
    raise ModuleNotFoundError("No module named 'levanter', for which this only stands in", name="levanter")
__path__ = list(_installed.submodule_search_locations)


def _stand_in(name: str, **contents: object) -> None:
    module = types.ModuleType(name, "Stands in for a package that levanter's models do not use.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules.setdefault(name, module)


_stand_in("datasets")
_stand_in("pyarrow.parquet")
_stand_in("pyarrow", RecordBatch=object, parquet=sys.modules["pyarrow.parquet"])
