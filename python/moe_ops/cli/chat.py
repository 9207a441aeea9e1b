"""`moe-ops chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from rich.console import Console
from transformers import TextStreamer

from moe_ops.cli.loading import LoadOptions, load
from moe_ops.hf.models.cache_argument import cache_name

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # Gives `input` a history, and keys to edit with.

# Of a checkpoint whose generation config has no limit; that of transformers' server.
_MOST_TOKENS = 1024
_HELP = "Ctrl-C stops an answer, /clear starts anew, /exit or Ctrl-D ends."


@dataclass
class _Speed:
    """Generated tokens, and the seconds of their answers, reading the prompt included."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> _Speed:
        """Adds an answer, and returns its own speed."""
        self.tokens += tokens
        self.seconds += seconds
        return _Speed(tokens, seconds)

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s"

    def print_sum(self, console: Console) -> None:
        """Prints the speed of all answers, if there were any."""
        if self.seconds:
            console.print(f"All answers: {self}.", style="dim")


class _Answer(TextStreamer):
    """Prints an answer while it is generated, and keeps its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)


@dataclass
class _Chat:
    """A conversation; its prompt is read anew only from where it differs from the last one."""

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    messages: list[dict[str, str]]
    _cache: Any = None
    _cached: list[int] = field(default_factory=list)

    def answer(self, text: str) -> int:
        """Prints the answer to a message; returns its number of tokens."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt()
        ids = prompt["input_ids"][0].tolist()
        name = cache_name(self.model.forward)
        if self._cache is not None and ids[: len(self._cached)] == self._cached:
            prompt[name] = self._cache
        self._cache = None
        streamer = _Answer(self.tokenizer)
        try:
            out = self.model.generate(
                **prompt,
                **self.settings,
                streamer=streamer,
                return_dict_in_generate=True,
            )
            # The last token has not been through the model.
            self._cache, self._cached = out.get(name), out.sequences[0, :-1].tolist()
        except KeyboardInterrupt:  # Layers of the cache may have different lengths.
            streamer.end()
        said = self.tokenizer.decode(streamer.tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        return len(streamer.tokens)

    def _prompt(self) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ValueError(
                f"chat: the chat template must take the messages, got: {error}"
            ) from error


def run(
    options: LoadOptions,
    console: Console,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> None:
    """Answers the lines of standard input. Answers go to standard output, all else to `console`.

    Raises:
        ValueError: invalid options, or a model that cannot chat.
    """
    model, tokenizer = load("chat", options, console, needs_template=True)
    most = max_new_tokens or model.generation_config.max_new_tokens or _MOST_TOKENS
    settings: dict[str, Any] = {"max_new_tokens": most}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    start = [{"role": "system", "content": system}] if system else []
    chat, total = _Chat(model, tokenizer, settings, [*start]), _Speed()
    console.print(_HELP, style="dim")
    try:
        while (text := _read()) not in (None, "/exit"):
            if text == "/clear":
                chat = _Chat(model, tokenizer, settings, [*start])
            elif text:
                before = time.perf_counter()
                count = chat.answer(text)
                spent = total.add(count, time.perf_counter() - before)
                console.print(f"[{spent}]", style="dim", markup=False)
    finally:
        total.print_sum(console)


def _read() -> str | None:
    """Returns a line of standard input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
    except EOFError:
        return None
