"""The server of transformers with an optimized model."""

from __future__ import annotations

import socket
from typing import Any

import transformers
from rich.console import Console

from moe_ops.cli import arguments
from moe_ops.cli.loading import LoadOptions, check, load

try:
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelLoader
except ImportError as error:
    raise ImportError(
        "serve: --engine transformers needs the server of transformers 5.25, got transformers "
        f"{transformers.__version__}: {error}."
    ) from error

# Continuous batching: tokens of a block of the cache, which transformers sets, and of a forward,
# whose mask has that many rows.
_PAGE, _BATCH_TOKENS = 256, 256


class _Loader(ModelLoader):
    """Loads the model in the process that generates with it. The server starts that process."""

    def __init__(self, options: LoadOptions, address: str) -> None:
        super().__init__()
        self._options, self._address = options, address

    def load_model_and_processor(self, model_id: str, on_progress: Any = None) -> tuple[Any, Any]:
        console = Console(stderr=True, highlight=False)
        try:
            loaded = load("serve", self._options, console)
        except (ValueError, OSError, ImportError) as error:
            raise SystemExit(arguments.fail(error).exit_code) from None
        text = f"Serving {self._options.model} at {self._address}"
        console.print(text, markup=False, soft_wrap=True)
        return loaded


class _Server(Serve):
    """The server of transformers with a loader and a socket of ours."""

    def __init__(self, loader: ModelLoader, listening: socket.socket, **options: Any) -> None:
        self._loader, self._listening = loader, listening
        super().__init__(**options)

    def run(self, *_: Any, **__: Any) -> None:
        self.loader = self._loader
        super().run(self._listening)


def run(
    options: LoadOptions, console: Console, host: str, port: int, cache_tokens: int | None
) -> None:
    """Serves a model until the process is interrupted; requests run together if the cache has a
    size.

    Raises:
        ValueError: invalid options, or a model that cannot be served.
        OSError: the address is in use.
    """
    tokenizer = check("serve", options).tokenizer
    if tokenizer.chat_template is None:
        console.print(
            "The tokenizer has no chat template: /v1/completions works, and /v1/chat/completions "
            "does not."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Clients that connect while the model is being loaded wait.
    with socket.create_server((host, port), family=family) as listening:
        address = f"http://{host}:{listening.getsockname()[1]}/v1"
        try:
            _Server(
                _Loader(options, address),
                listening,
                force_model=str(options.model),
                host=host,
                port=port,
                continuous_batching=cache_tokens is not None,
                cb_num_blocks=-(-cache_tokens // _PAGE) if cache_tokens else None,
                cb_max_batch_tokens=_BATCH_TOKENS if cache_tokens else None,
            )
        except RuntimeError as error:
            # The process of the model has ended, and has said why.
            raise arguments.fail(f"serve: {error}") from None
