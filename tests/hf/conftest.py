from __future__ import annotations

import importlib.util

# The folder needs the `hf` extra; without it there is nothing to collect.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]
