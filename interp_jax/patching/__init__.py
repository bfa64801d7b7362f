"""Patching third-party Python code on its syntax tree, as data, with nothing changed on disk.

```python
import interp_jax.patching as patching

patching.install("transformers")            # a patch set: patches the library's modules as they are imported
from transformers import FlaxLlamaForCausalLM
```

or, for code of one's own,

```python
with patching.Patcher(module, {"Block.__call__": ["self.mlp($x)", "site(self.mlp($x), 'mlp_out')"]}, imports=[...]):
    ...
```

This package imports no JAX, so it can patch a library before JAX is loaded, and patches programs that never load it.
"""

from interp_jax.patching.checking import PairReport as PairReport
from interp_jax.patching.checking import SetReport as SetReport
from interp_jax.patching.checking import check as check
from interp_jax.patching.checking import patched_texts as patched_texts
from interp_jax.patching.errors import AlreadyImportedError as AlreadyImportedError
from interp_jax.patching.errors import ConflictError as ConflictError
from interp_jax.patching.errors import DefinitionError as DefinitionError
from interp_jax.patching.errors import MatchError as MatchError
from interp_jax.patching.errors import MemberError as MemberError
from interp_jax.patching.errors import PatchError as PatchError
from interp_jax.patching.errors import PatchSetError as PatchSetError
from interp_jax.patching.errors import PatternSyntaxError as PatternSyntaxError
from interp_jax.patching.errors import SourceError as SourceError
from interp_jax.patching.errors import UnknownPatchSetError as UnknownPatchSetError
from interp_jax.patching.pair import Pair as Pair
from interp_jax.patching.patch_set import PatchSet as PatchSet
from interp_jax.patching.patch_set import install as install
from interp_jax.patching.patch_set import known as known
from interp_jax.patching.patch_set import load as load
from interp_jax.patching.patcher import Patcher as Patcher
