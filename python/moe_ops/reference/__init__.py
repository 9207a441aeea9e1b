"""The ops of moe_ops in plain torch: the contract as code, and the truth the tests compare with.

Same names and arguments as the public functions. Readable before fast: differentiable by ordinary
autograd, no argument checks, and free to read offsets on the host. Half types are computed in fp32
and cast back at the end; fp64 stays fp64.

A file has the op of its name, and is found without a line here; one of several ops names them in
`__all__`. `__init__.pyi` gives them to type checkers: their types are those of the ops.
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
