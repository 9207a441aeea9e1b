"""Draws docs/hybrid-timeline.svg: the work of a model of `moe_ops.hf.place` over time, with a
thread in place of the GPU.

    OMP_NUM_THREADS=1 python -m bench.cpu.timeline

The thread runs the jobs of a GPU's stream in their order: the copies of a layer's experts, and
everything else of the layer but additions. It is a core of the CPU, and its jobs take the time that
they take there. The host waits for each job but the shared experts, which it leaves to the thread
as it leaves them to a GPU. The routed experts run in the calling thread.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe import modeling_glm4_moe as glm

import moe_ops.hf
from bench.harness import machine
from bench.harness.files import ROOT
from bench.studies.picture import write_svg
from moe_ops import _seam

PICTURE = ROOT / "docs" / "hybrid-timeline.svg"
SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 256,
}
TOKENS = (1, 16)
WARM_UPS = 5
HOST, STREAM = LANES = "calling thread", "thread in place\nof the GPU"
DENSE = "attention, norms, router"
PARTS = (glm.Glm4MoeAttention, glm.Glm4MoeRMSNorm, glm.Glm4MoeTopkRouter)
COLORS = {
    DENSE: "#999999",
    "copies": "#222222",
    "shared experts": "#0072B2",
    "routed experts": "#E69F00",
}


class Span(NamedTuple):
    """Work of one thread, from `start` to `end` in seconds."""

    lane: str
    name: str
    start: float
    end: float


class Stream:
    """A thread that runs jobs in their order.

    Attributes:
        spans: the work of this thread, and of others that call `timed`.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._pool = ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,))
        self._thread = self._pool.submit(threading.get_ident).result()

    def submit(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(self.timed, STREAM, name, call, *args, **kwargs)

    def run(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a job; a job's own jobs are parts of it."""
        if threading.get_ident() == self._thread:
            return call(*args, **kwargs)
        return self.submit(name, call, *args, **kwargs).result()

    def timed(self, lane: str, name: str, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        start = time.perf_counter()
        found = call(*args, **kw)
        self.spans.append(Span(lane, name, start, time.perf_counter()))
        return found

    def close(self) -> None:
        self._pool.shutdown()


@contextlib.contextmanager
def on_threads(stream: Stream) -> Iterator[None]:
    """Runs the parts of GLM-4's layers and the copies of placed experts on the stream."""
    shared, experts = glm.Glm4MoeMLP.forward, glm.Glm4MoeExperts.forward

    def run_shared(module: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        stream.submit("shared experts", lambda: y.copy_(shared(module, x)))
        return y  # The copy of the routed experts' result comes later in the stream.

    def run_experts(*args: Any, **kwargs: Any) -> Any:
        return stream.timed(HOST, "routed experts", experts, *args, **kwargs)

    def copy_to_cpu(
        tensors: Sequence[Tensor], meanwhile: Callable[[], object] | None = None
    ) -> list[Tensor]:
        copies = stream.submit("copies", lambda: [t.clone() for t in tensors])
        if meanwhile is not None:
            meanwhile()
        found: list[Tensor] = copies.result()
        return found

    def copy_to(t: Tensor, device: torch.device) -> Any:
        return stream.run("copies", t.clone)

    def dense(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: stream.run(DENSE, own, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            *((cls, "forward", dense(cls.forward)) for cls in PARTS),
            (glm.Glm4MoeMLP, "forward", run_shared),
            (glm.Glm4MoeExperts, "forward", run_experts),
            (_seam, "_copy_to_cpu", copy_to_cpu),
            (_seam, "_copy_to", copy_to),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def make_model(**sizes: int) -> Any:
    """Returns a random model with its experts placed."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**{**SIZES, **sizes})).bfloat16().eval()
    moe_ops.hf.place(model, "cpu")
    return model


@torch.no_grad()
def record(model: Any, tokens: int) -> tuple[list[Span], Tensor]:
    """Returns the spans and logits of one forward of a sequence, after others."""
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
    stream = Stream()
    with on_threads(stream), contextlib.closing(stream):
        for _ in range(WARM_UPS + 1):
            stream.spans.clear()
            logits = model(ids, use_cache=False).logits
    return stream.spans, logits


def overlap(spans: Sequence[Span]) -> float:
    """Returns the fraction of the shared experts' time in which routed experts ran."""
    ours, theirs = ([s for s in spans if s.name == f"{n} experts"] for n in ("shared", "routed"))
    both = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in ours for b in theirs)
    return both / sum(span.end - span.start for span in ours)


def draw(runs: dict[int, list[Span]], path: Path, source: str) -> None:
    """Writes the picture: one panel per number of tokens."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybrid-timeline"}):
        figure = Figure(figsize=(8, 1 + 1.6 * len(runs)), layout="constrained", facecolor="white")
        grid = figure.subplots(len(runs), 1, squeeze=False)
        for axes, (tokens, spans) in zip(grid[:, 0], runs.items(), strict=True):
            begin = min(span.start for span in spans)
            for span in spans:
                left, width = (span.start - begin) * 1e3, (span.end - span.start) * 1e3
                axes.barh(LANES.index(span.lane), width, 0.7, left, color=COLORS[span.name])
            axes.set_yticks(range(len(LANES)), LANES, fontsize=9)
            axes.set_ylim(-0.6, len(LANES) - 0.4)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.set_title(
                f"{tokens} token{'s'[: tokens > 1]} in a forward", loc="left", fontsize=9
            )
            axes.set_xlabel("milliseconds", fontsize=9)
        figure.suptitle("A CPU thread stands for the GPU, whose times differ.", fontsize=10)
        figure.legend(
            [Patch(color=color) for color in COLORS.values()],
            list(COLORS),
            loc="outside lower center",
            ncols=len(COLORS),
            frameon=False,
            fontsize=9,
        )
        write_svg(figure, path, Description=source)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.timeline")
    parser.add_argument("--out", type=Path, default=PICTURE)
    path = parser.parse_args().out
    model = make_model()
    runs = {tokens: record(model, tokens)[0] for tokens in TOKENS}
    for tokens, spans in runs.items():
        print(f"{tokens} tokens: {overlap(spans):.0%} of the shared experts' time is hidden")
    draw(runs, path, f"{machine.describe_machine()['cpu']}, {machine.now()}")


if __name__ == "__main__":
    main()
