"""Modules of the zoo by their earlier names: importing one still works, and warns."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "blocks": ("lm.attention", "lm.config"),
    "checkpoint": ("lm.checkpoint",),
    "cross_entropy": ("lm.cross_entropy",),
    "embedding": ("lm.embedding",),
    "graphs": ("mowst.graphs",),
    "language_model": ("lm.model", "lm.pretrained"),
    "lm_losses": ("lm.losses",),
    "mowst_training": ("mowst.training",),
    "multitask": ("home.layers",),
    "recommend": ("home.training",),
    "t2mir_envs": ("t2mir.envs",),
    "t2mir_routers": ("t2mir.routers",),
    "t2mir_training": ("t2mir.training",),
}
PACKAGE = __name__.rpartition(".")[0]


class _Moved(MetaPathFinder, Loader):
    """Finds a module of `MOVED`, whose names are those of the modules it became."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if parent == PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        names = [f"{PACKAGE}.{name}" for name in MOVED[module.__name__.rpartition(".")[2]]]
        places = [importlib.import_module(name) for name in names]
        warnings.warn(
            f"{module.__name__} is now {' and '.join(names)}; its earlier name will go.",
            DeprecationWarning,
            stacklevel=2,
        )

        def find(name: str) -> Any:
            for place in places:
                if hasattr(place, name):
                    return getattr(place, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


# Last: asked for what no file answers.
sys.meta_path.append(_Moved())
