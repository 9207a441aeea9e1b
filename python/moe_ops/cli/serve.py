"""`moe-ops serve`: a model behind the OpenAI-style server of transformers or of vLLM."""

from __future__ import annotations

import os
import sys
from importlib import util

from rich.console import Console
from transformers.utils.import_utils import is_serve_available

from moe_ops.cli.loading import LoadOptions

ENGINES = ("transformers", "vllm")
_VLLM = "vllm.entrypoints.openai.api_server"


def run(
    options: LoadOptions,
    console: Console,
    *,
    host: str,
    port: int,
    engine: str,
    cache_tokens: int | None = None,
) -> None:
    """Serves a model until the process is interrupted; requests run together if the cache has a
    size.

    Raises:
        ValueError: invalid options, or a model that cannot be served.
        ImportError: the packages of the engine are not installed.
        OSError: the address is in use.
    """
    if engine not in ENGINES:
        raise ValueError(f"serve: --engine must be {' or '.join(ENGINES)}, got {engine!r}.")
    if engine == "vllm":
        _run_vllm(options, host, port, cache_tokens)
    if not is_serve_available():
        raise ImportError(
            "moe-ops serve needs the server of transformers: "
            'pip install "transformers[serving]" (fastapi, uvicorn, openai)'
        )
    from moe_ops.cli import server

    server.run(options, console, host, port, cache_tokens)


def _run_vllm(options: LoadOptions, host: str, port: int, cache_tokens: int | None) -> None:
    """Becomes the process of vLLM's server."""
    if util.find_spec("vllm") is None:
        raise ImportError(
            "moe-ops serve --engine vllm needs vLLM and the plugin torch-moe-ops-vllm: see "
            "docs/serving.md"
        )
    values = options.quantize, options.threads, cache_tokens
    for name, value in zip(("quantize", "threads", "cache-tokens"), values, strict=True):
        if value is not None:
            raise ValueError(f"serve: --{name} must come with --engine transformers, got vllm.")
    words = ["--model", str(options.model), "--host", host, "--port", str(port)]
    words += ["--dtype", options.dtype]
    os.execv(sys.executable, [sys.executable, "-m", _VLLM, *words])
