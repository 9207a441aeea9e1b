"""Prediction of routes from tokens, before the model runs.

Letters: B sequences, S tokens per sequence, V vocabulary, L calls of experts per step, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops import _files, _reading, _tensor_file
from moe_ops._fields import Fields

from .trace import ExpertTrace

_KIND = "moe_ops.ExpertPredictor/2"
_SIZES = ("vocab_size", "num_calls", "num_experts", "window", "width", "num_layers", "num_heads")


class ExpertPredictor(nn.Module):
    """Small causal transformer encoder that maps tokens to logits that each call uses each expert.

    Args:
        vocab_size: V.
        num_calls, num_experts: L, E.
        window: maximum number of tokens of its context.
        width, num_layers, num_heads: of the encoder.

    Source: He et al. 2024 (ExpertFlow, arXiv 2410.17954), whose predictor is a T5 encoder-decoder;
    this one has only an encoder.
    """

    def __init__(
        self,
        vocab_size: int,
        num_calls: int,
        num_experts: int,
        *,
        window: int = 32,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.num_calls = num_calls
        self.num_experts = num_experts
        self.window = window
        self.config = {
            "vocab_size": vocab_size,
            "num_calls": num_calls,
            "num_experts": num_experts,
            "window": window,
            "width": width,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.zeros(window, width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            ),
            num_layers,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(width, num_calls * num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes logits [B, S, L, E] for tokens [B, S], S at most `window`; ids outside [0, V)
        are treated as 0."""
        length = tokens.shape[1]
        if length > self.window:
            raise ValueError(
                f"ExpertPredictor: tokens must be at most {self.window} in a row, got {length}."
            )
        known = tokens.masked_fill((tokens < 0) | (tokens >= self.vocab_size), 0)
        x = self.embedding(known) + self.position[:length]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.encoder(x, mask=mask)
        return self.head(x).unflatten(-1, (self.num_calls, self.num_experts))

    @torch.no_grad()
    def chances(self, tokens: Tensor) -> Tensor:
        """Computes [B, S, L, E], the probability that each token uses each expert; S is any length,
        each run of `window` tokens is processed separately."""
        return torch.cat([self(run).sigmoid() for run in tokens.split(self.window, 1)], 1)

    def stream(self) -> Callable[[Tensor], Tensor]:
        """Returns a function for `PredictivePolicy`, called once per step: tokens [B, S] -> [L, E],
        the probability that any of them uses an expert. A step with one token per sequence
        continues the sequences of earlier steps if their number is equal."""
        context: Tensor | None = None

        def predict(tokens: Tensor) -> Tensor:
            nonlocal context
            tokens = tokens.detach().to(self.position.device)
            if tokens.shape[1] == 1 and context is not None and len(context) == len(tokens):
                context = torch.cat((context, tokens), 1)[:, -self.window :]
                with torch.no_grad():
                    chances = self(context)[:, -1:].sigmoid()
            else:
                context = tokens[:, -self.window :]
                chances = self.chances(tokens)
            return 1 - (1 - chances).flatten(0, 1).prod(0)

        return predict

    def save(self, path: Path | str) -> None:
        """Writes weights and sizes, with a checksum of both.

        Raises:
            OSError: it could not be written.
        """
        _tensor_file.write_tensors(path, _KIND, self.state_dict(), self.config)

    @classmethod
    def load(cls, path: Path | str) -> ExpertPredictor:
        """Reads a file of `save`; the file cannot run code.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not a regular file, it was corrupted or written by an earlier version,
                or its weights do not match its sizes. All checks precede the allocation of the
                model.
        """
        reader = f"{cls.__name__}.load"
        tensors, about = _tensor_file.read_tensors(path, reader, _KIND)
        fields = Fields(about, reader, f"the sizes in {path}")
        sizes = {name: fields.size(name) for name in _SIZES}
        if sizes["num_layers"] > len(tensors):
            raise ValueError(
                f"{reader}: num_layers in {path} must be at most its {len(tensors)} tensors, got "
                f"{sizes['num_layers']}."
            )
        with _reading.damage(reader, path, f"a file of {cls.__name__}.save"):
            with torch.device("meta"):
                model = cls(**sizes)
            wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
            found = {name: list(t.shape) for name, t in tensors.items()}
            for name in sorted({*wanted, *found}):
                if wanted.get(name) != found.get(name):
                    raise ValueError(
                        f"{reader}: {_files.shown(name)} in {path} must be "
                        f"{wanted.get(name, 'no tensor')}, got {found.get(name, 'none')}."
                    )
            model.to_empty(device=torch.get_default_device())
            model.load_state_dict(tensors)
        return model.eval()


def train_predictor(
    trace: ExpertTrace,
    vocab_size: int,
    *,
    steps: int = 300,
    batch: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    window: int = 32,
    width: int = 64,
    num_layers: int = 2,
) -> ExpertPredictor:
    """Trains a predictor of the routes of a trace, with binary cross-entropy on the sets of
    experts.

    Args:
        trace: with known tokens; sequences with at least two tokens are used.
        vocab_size: V of the model.
        steps, batch, learning_rate: of AdamW, on `batch` random windows per step.
        seed: of the weights and the windows.
        window, width, num_layers: see `ExpertPredictor`.

    Returns:
        The predictor, in eval mode.

    Raises:
        ValueError: no sequence, or a sequence of unknown tokens.
    """
    sequences = [rows for rows in trace.sequences() if len(rows) > 1]
    if not sequences or any(bool((trace.tokens[rows] < 0).any()) for rows in sequences):
        raise ValueError(
            "train_predictor: trace must have sequences of known tokens, got "
            + ("tokens that are not known." if sequences else "none of two tokens or more.")
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ExpertPredictor(
            vocab_size,
            len(trace.banks),
            trace.num_experts,
            window=window,
            width=width,
            num_layers=num_layers,
        )
    targets = trace.multi_hot()
    length = min(window, *(len(rows) for rows in sequences))
    weights = torch.tensor([float(len(rows)) for rows in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, max(steps, 2))
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            picked = torch.multinomial(weights, batch, replacement=True, generator=generator)
            rows = []
            for index in picked.tolist():
                last = len(sequences[index]) - length
                first = int(torch.randint(last + 1, (1,), generator=generator))
                rows.append(sequences[index][first : first + length])
            where = torch.stack(rows)
            loss = F.binary_cross_entropy_with_logits(
                model(trace.tokens[where]), targets[where].float()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
