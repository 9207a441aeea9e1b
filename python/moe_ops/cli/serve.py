"""`moe-ops serve`: a model behind the OpenAI-style server of transformers or of vLLM."""

from __future__ import annotations

import os
import socket
import sys
import time
from importlib import util
from typing import Any

from rich.console import Console
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import TimedModel
from transformers.utils.import_utils import is_serve_available

from moe_ops.cli.loading import LoadOptions, Speed, load

ENGINES = ("transformers", "vllm")
_VLLM = "vllm.entrypoints.openai.api_server"
# Continuous batching: tokens of a block of the cache, which transformers sets, and of a forward,
# whose mask has that many rows.
_PAGE, _BATCH_TOKENS = 256, 256


class _Server(Serve):
    """transformers' server, which `run` starts when the model is in it."""

    def start_server(self) -> None:
        pass


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
    # Clients that connect while the model is being loaded wait.
    with socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listening:
        model, tokenizer = load("serve", options, console)
        if tokenizer.chat_template is None:
            console.print(
                "The tokenizer has no chat template: /v1/completions works, and "
                "/v1/chat/completions does not."
            )
        total = Speed()
        _time_answers(model, total, console)
        name = str(options.model)
        server = _Server(
            host=host,
            port=port,
            non_blocking=True,
            continuous_batching=cache_tokens is not None,
            cb_num_blocks=-(-cache_tokens // _PAGE) if cache_tokens else None,
            cb_max_batch_tokens=_BATCH_TOKENS if cache_tokens else None,
        )
        manager = server._model_manager
        key, held = manager.process_model_name(name), manager.loaded_models
        held[key] = TimedModel(model, -1, tokenizer, on_unload=lambda: held.pop(key, None))
        manager.force_model = name
        address = f"http://{host}:{listening.getsockname()[1]}/v1"
        console.print(f"Serving {name} at {address}", markup=False, soft_wrap=True)
        try:
            server.server.run(sockets=[listening])
        finally:
            total.print_sum(console)


def _time_answers(model: Any, total: Speed, console: Console) -> None:
    """Has each answer print its speed and added to `total`."""
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        sequences = generate(*args, **kwargs)
        count = sequences.shape[-1] - kwargs["input_ids"].shape[-1]
        console.print(str(total.add(count, time.perf_counter() - before)), style="dim")
        return sequences

    model.generate = timed


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
