"""THOR as an encoder and a decoder or as a decoder alone, and its loss.

Letters: B sequences, S tokens of each, S' tokens of a source, H hidden size, E experts, M layers
with experts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_types
from moe_ops.layers import KVCache

from .._presets import preset
from ..lm.checkpoint import Entry
from ..lm.config import LMConfig, number, size
from ..lm.embedding import TokenEmbedding
from ..lm.pretrained import Pretrained
from .layers import RandomExperts, ThorBlock

LEVELS = ("batch", "sentence", "token")
# Tokens that every vocabulary has at these ids, as in fairseq.
BOS, PAD, EOS, UNKNOWN = range(4)


@dataclass(frozen=True)
class ThorConfig(LMConfig):
    """Sizes and options.

    Attributes, beside those of `LMConfig`:
        vocab_size: with the four special tokens. num_layers: of the decoder.
        num_encoder_layers: 0: a decoder alone.
        num_heads, intermediate_size: of all blocks.
        num_experts: E of every second block, the first one among them; 1: a dense model.
        passes: forward passes of a training step, 1 or 2.
        consistency: alpha, weight of the consistency loss of two passes.
        dropout, label_smoothing: of training.

    With two passes: several experts are THOR, one expert is R-Drop.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        "vocab_size": size("vocab_size"),
        "hidden_size": size("decoder_embed_dim"),
        "num_layers": size("decoder_layers"),
        "num_encoder_layers": size("encoder_layers", least=0),
        "num_heads": size("decoder_attention_heads"),
        "intermediate_size": size("decoder_ffn_embed_dim"),
        "num_experts": size("num_experts"),
        "consistency": number("consistency_alpha", least=0),
        "dropout": number("dropout", least=0),
        "label_smoothing": number("label_smoothing", least=0),
    }

    vocab_size: int = 260
    hidden_size: int = 64
    num_layers: int = 2
    num_encoder_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 128
    num_experts: int = 4
    passes: int = 2
    consistency: float = 5.0
    dropout: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "ThorConfig")
        if self.passes not in (1, 2):
            raise ValueError(f"ThorConfig: passes must be 1 or 2, got {self.passes}.")
        if self.hidden_size % 2 or self.hidden_size < 4:
            raise ValueError(
                f"ThorConfig: hidden_size must be even and at least 4, got {self.hidden_size}."
            )

    tiny = preset("Bytes, two blocks on each side.")
    tiny_decoder = preset(
        "Bytes, four blocks of a decoder alone.",
        num_encoder_layers=0,
        num_layers=4,
    )
    iwslt = preset(
        "The published run on IWSLT'14 German to English. The vocabulary depends on the data.",
        vocab_size=10_152,
        hidden_size=512,
        num_layers=6,
        num_encoder_layers=6,
        num_heads=4,
        intermediate_size=1024,
        num_experts=2,
        dropout=0.3,
        context=1024,
    )

    def write_more(self) -> dict[str, Any]:
        return {"architectures": ["Thor"], "model_type": "thor"}


class Memory(NamedTuple):
    """Source of a decoder: keys and values of each of its layers, [B, S', n, d] each, and seen,
    bool [B, S'], False at padding."""

    keys_values: list[tuple[Tensor, Tensor]]
    seen: Tensor


class ThorLoss(NamedTuple):
    """Training loss and its parts, scalars.

    loss: the smoothed cross-entropies of all passes, added, plus alpha * consistency.
    cross_entropy: mean over passes and counted tokens, in nats, not smoothed.
    consistency: (KL(p || q) + KL(q || p)) / 2, mean over counted tokens; 0 with one pass.
    """

    loss: Tensor
    cross_entropy: Tensor
    consistency: Tensor


class Thor(Pretrained):
    """THOR model. Embeddings of source, target and output are one matrix.

    Sequences end with `EOS` and are padded with `PAD`; the decoder's input begins with `EOS`. The
    caller draws experts (`draw_experts`): `loss` draws one per layer for a whole pass.

    Parameters: embed_tokens.weight [V, H]; encoder_layers and decoder_layers of `ThorBlock`s.
    """

    config_class: ClassVar[type[LMConfig]] = ThorConfig
    ignored_keys = (
        r"(en|de)coder\.version",
        r"embed_positions\._float_tensor",
        r"decoder\.embed_tokens\.weight",
        r"decoder\.output_projection\.weight",
    )
    config: ThorConfig

    def __init__(self, config: ThorConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)

        def blocks(count: int, **kind: bool) -> nn.ModuleList:
            numbers = (1 if i % 2 else config.num_experts for i in range(count))
            return nn.ModuleList(ThorBlock(config, self.make_ffn(n), **kind) for n in numbers)

        encoder = config.num_encoder_layers
        self.encoder_layers = blocks(encoder, decoder=False, cross=False)
        self.decoder_layers = blocks(config.num_layers, decoder=True, cross=encoder > 0)
        self.reset_parameters()

    def make_ffn(self, num_experts: int) -> nn.Module:
        """Returns the feed-forward part of a block; with one expert it is a dense network."""
        return RandomExperts(self.config.hidden_size, self.config.intermediate_size, num_experts)

    def reset_parameters(self) -> None:
        """Draws embeddings from N(0, 1 / H) and matrices with Glorot's initialization; norms are 1,
        biases 0."""
        for name, parameter in self.named_parameters():
            if name.startswith("embed"):
                nn.init.normal_(parameter, std=self.config.hidden_size**-0.5)
            elif name.endswith(("bias", "b_gate_up", "b_down")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                bound = math.sqrt(6 / sum(parameter.shape[-2:]))
                nn.init.uniform_(parameter, -bound, bound)

    # Experts.

    def draw_experts(
        self,
        level: str,
        side: str,
        batch: int,
        length: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws random experts for the layers that have experts.

        Args:
            level: "batch", one per layer, as in training; "sentence", one per layer and sequence;
                "token", one per layer and token, which is the paper's other way to infer.
            side: "encoder" or "decoder".
            batch, length: B, and S of "token".

        Returns:
            int64 [M, B] ("token": [M, B, S]).
        """
        check_choice("Thor", "level", level, LEVELS)
        count = (len(self._layers_of(side)) + 1) // 2
        shape = {"batch": (count, 1), "sentence": (count, batch), "token": (count, batch, length)}
        place = "cpu" if generator is None else generator.device
        drawn = torch.randint(
            self.config.num_experts, shape[level], generator=generator, device=place
        )
        drawn = drawn.expand(-1, batch) if level == "batch" else drawn
        return drawn.to(self.embed_tokens.weight.device)

    def _layers_of(self, side: str) -> Any:
        check_choice("Thor", "side", side, ("encoder", "decoder"))
        return self.encoder_layers if side == "encoder" else self.decoder_layers

    # Forward passes.

    def _embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.embed_tokens(tokens) * math.sqrt(self.config.hidden_size)
        return self.dropout(x + positions(start, tokens.shape[1], x))

    def encode(self, source: Tensor, experts: Tensor | None = None) -> Memory:
        """Reads sources [B, S'] for the decoder.

        Args:
            experts: from `draw_experts` for the encoder; None: the mean of all.
        """
        if not len(self.encoder_layers):
            raise ValueError("Thor.encode: num_encoder_layers must be above 0, got 0.")
        seen = source != PAD
        x = self._embed(source)
        for i, layer in enumerate(self.encoder_layers):
            x = layer(x, chosen=_of_layer(experts, i), seen=seen)
        layers: Any = self.decoder_layers
        return Memory([layer.cross_attention.keys_values(x) for layer in layers], seen)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        experts: Tensor | None = None,
        *,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """Returns logits [B, S, V] of the token after each of tokens [B, S].

        Args:
            memory: from `encode`; None for a decoder alone.
            experts: of `draw_experts` for the decoder; None: the mean of all.
            cache: of `new_cache`, with the tokens before these; these are appended.

        Raises:
            ValueError: a memory is missing or unexpected.
        """
        if (memory is None) != (not len(self.encoder_layers)):
            wanted = "None" if memory is not None else "what encode gives"
            raise ValueError(
                f"Thor: memory must be {wanted} with {len(self.encoder_layers)} encoder layers, "
                f"got {'None' if memory is None else 'one'}."
            )
        x = self._embed(tokens, 0 if cache is None else cache[0].length)
        for i, layer in enumerate(self.decoder_layers):
            x = layer(
                x,
                chosen=_of_layer(experts, i),
                cache=None if cache is None else cache[i],
                memory=None if memory is None else memory.keys_values[i],
                memory_seen=None if memory is None else memory.seen,
            )
        return F.linear(x, self.embed_tokens.weight)

    def new_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.decoder_layers]

    # The loss.

    def loss(
        self,
        target: Tensor,
        source: Tensor | None = None,
        *,
        experts: tuple[Tensor | None, Tensor | None] | None = None,
        passes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ThorLoss:
        """Computes the loss of one training step on pairs, or on text alone.

        Passes run as one batch with that many times the sequences, each with its own dropout and
        experts.

        Args:
            target: [B, S], each row ends with `EOS` and is padded with `PAD`.
            source: [B, S'] in the format of target. A decoder alone reads it before the target, and
                its tokens do not count in the loss.
            experts: of encoder and decoder, [M, passes * B] and so on; None: drawn for each pass,
                or in `eval` the mean of all.
            passes: None: the config's; 1 to evaluate.
            generator: of the draws.
        """
        config, count = self.config, self.config.passes if passes is None else passes
        sides: tuple[Tensor | None, Tensor | None] = (None, None)
        if experts is not None:
            sides = experts
        elif self.training and config.num_experts > 1:
            drawn = [
                [self.draw_experts("batch", side, len(target), generator=generator)
                 for _ in range(count)]
                for side in ("encoder", "decoder")
            ]  # fmt: skip
            sides = (torch.cat(drawn[0], dim=1), torch.cat(drawn[1], dim=1))
        counted = target != PAD
        if source is not None and not len(self.encoder_layers):
            target, counted = join(source, target)
            source = None
        read = torch.cat([target.new_full((len(target), 1), EOS), target[:, :-1]], dim=1)
        memory = None
        if source is not None:
            memory = self.encode(source.repeat(count, 1), sides[0])
        logits = self(read.repeat(count, 1), memory, sides[1])
        logits = logits.view(count, -1, logits.shape[-1])[:, counted.flatten()]
        wanted = target[counted].repeat(count)
        flat = logits.flatten(0, 1)
        smoothed = F.cross_entropy(flat, wanted, label_smoothing=config.label_smoothing)
        total, consistency = count * smoothed, smoothed.new_zeros(())
        if count == 2:
            consistency = symmetric_kl(logits[0], logits[1])
            if config.consistency:
                total = total + config.consistency * consistency
        with torch.no_grad():
            plain = smoothed if not config.label_smoothing else F.cross_entropy(flat, wanted)
        return ThorLoss(total, plain.detach(), consistency)

    # Checkpoints and counts.

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_tokens.weight", ("encoder.embed_tokens.weight",))]
        for side in ("encoder", "decoder"):
            for i, layer in enumerate(self._layers_of(side)):
                entries += layer.entries(f"{side}_layers.{i}", f"{side}.layers.{i}")
        return entries

    def idle_parameters(self) -> int:
        """Returns the number of expert parameters that a token does not use."""
        idle = super().idle_parameters()
        for module in self.modules():
            if isinstance(module, RandomExperts):
                count = module.experts.num_experts
                idle += sum(p.numel() for p in module.parameters()) * (count - 1) // count
        return idle


def _of_layer(experts: Tensor | None, layer: int) -> Tensor | None:
    """Returns the experts of a layer: every second layer has experts, starting with the first."""
    return None if experts is None or layer % 2 else experts[layer // 2]


def positions(start: int, length: int, like: Tensor) -> Tensor:
    """Returns sinusoids [length, H] of the positions from `start` on, sines first, as in fairseq:
    the first token of a sequence has position 2, and frequencies decrease from 1 to 1/10000."""
    half = like.shape[-1] // 2
    place = torch.arange(start, start + length, device=like.device, dtype=torch.float64) + 2
    falls = torch.arange(half, device=like.device, dtype=torch.float64) / (half - 1)
    angle = place[:, None] * 10_000.0**-falls
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """Returns (KL(p || q) + KL(q || p)) / 2 of p = softmax(a) and q = softmax(b), [N, V] each,
    averaged over N."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def join(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenates each source [B, S'] and its target [B, S] to [B, S''], padded with `PAD`; also
    returns bool [B, S''], True at the target's tokens."""
    rows = [
        torch.cat([s[s != PAD], t[t != PAD]]) for s, t in zip(source, target, strict=True)
    ]  # fmt: skip
    joined = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    first = (source != PAD).sum(1, keepdim=True)
    places = torch.arange(joined.shape[1], device=joined.device)
    return joined, (places >= first) & (joined != PAD)
