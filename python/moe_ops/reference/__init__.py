"""Reference implementations of the ops in plain torch, which tests compare with.

They have the names and arguments of the public functions. They favor readability over speed:
differentiable by ordinary autograd, without argument checks, and free to read offsets on the host.
Half-precision dtypes are computed in fp32 and cast back at the end; fp64 stays fp64.

Each file contains the op of its name and is found automatically; a file with several ops names them
in `__all__`. `__init__.pyi` declares them for type checkers, with the types of the ops.
"""

from __future__ import annotations

import importlib
import pkgutil

__all__: list[str] = []
for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_file.name}")
        for _name in getattr(_module, "__all__", (_file.name,)):
            globals()[_name] = getattr(_module, _name)
            __all__.append(_name)
