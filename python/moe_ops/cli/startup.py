"""Runs at the start of a Python in which `moe-ops run --install` has put it, and of processes that
a command of `moe-ops run` spawns.

It must be fast, and so imports nothing: when a program imports transformers, moe_ops.hf follows.
"""

import sys


class _AfterTransformers:
    """Finds transformers with a loader that imports moe_ops.hf after it."""

    searching = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "transformers" or cls.searching:
            return None
        from importlib import util

        cls.searching = True
        try:
            spec = util.find_spec(name)
        finally:
            cls.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                import moe_ops.hf  # noqa: F401

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterTransformers)
