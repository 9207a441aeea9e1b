"""Common parts of the zoo's language models: the backbone, losses, generation.

Letters: B sequences, S tokens of each, T = B * S, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_least
from moe_ops.layers import KVCache
from moe_ops.layers.head_loss import head_cross_entropy
from moe_ops.layers.rotary import Rope

from .blocks import Step
from .checkpoint import Entry
from .embedding import TokenEmbedding
from .losses import OF_LAYERS, AuxLoss, Routed, sum_over_layers
from .pretrained import Pretrained


class LMOutput(NamedTuple):
    """Logits [B, S, V] and the routing of every routed layer, in the order of computation."""

    logits: Tensor
    routing: list[Routed]


class LMLoss(NamedTuple):
    """Training loss and its parts.

    loss: cross_entropy plus each auxiliary loss times its coefficient, a scalar.
    cross_entropy: mean over the predicted tokens, in nats.
    aux_losses: name -> sum over routed layers, not multiplied by its coefficient.
    routing: as in LMOutput.
    """

    loss: Tensor
    cross_entropy: Tensor
    aux_losses: dict[str, Tensor]
    routing: list[Routed]


class CausalLM(Pretrained):
    """Decoder: embedding, blocks, a norm, and the logits of the next token.

    A subclass calls `assemble` with its blocks, each of which takes (x, step, index) and returns x,
    and lists the published names of a block's tensors in `block_entries`.
    """

    # Regular expressions of published keys that are unused.
    ignored_keys: tuple[str, ...] = (r"rotary_emb\.inv_freq",)

    embed_tokens: nn.Embedding
    layers: Any  # ModuleList of the subclass's blocks.
    norm: nn.Module
    lm_head: nn.Linear | None
    rope: Rope | None

    def assemble(
        self,
        config: Any,
        blocks: Iterable[nn.Module],
        rope: Rope | None,
        norm: nn.Module | None = None,
    ) -> None:
        """Creates the backbone, with newly initialized weights.

        Args:
            config: with `vocab_size`, `hidden_size`, and `tie_embeddings` if the embedding can also
                be the output's weight.
            blocks: made one after the other, after the embedding.
            rope: None for no positions.
            norm: the last one; None: an RMS norm with the config's `norm_eps`.
        """
        self.config = config
        self.rope = rope
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm or nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = None
        if getattr(config, "tie_embeddings", False):
            # Some writers also store the output weight; the embedding takes precedence.
            self.ignored_keys = (*self.ignored_keys, r"lm_head\.weight")
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights from N(0, init_std); norms are 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: Sequence[KVCache] | None = None,
        return_routing: bool = False,
        last: int | None = None,
        head: bool = True,
    ) -> Tensor | LMOutput:
        """Returns logits of the next token, [B, S, V], or an LMOutput with `return_routing=True`.

        Args:
            tokens: [B, S] integers in [0, V).
            cache: from `new_cache`, with the preceding tokens; these are appended.
            return_routing: also return every router's routing.
            last: number of last positions for which logits are computed.
            head: False: returns the head's input, hidden states [B, S, H], in place of logits.

        Raises:
            ValueError: tokens are not two-dimensional integers.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            kind = str(tokens.dtype).removeprefix("torch.")
            raise ValueError(
                f"{type(self).__name__}: tokens must be [B, S] integers, got {kind} of shape "
                f"{list(tokens.shape)}."
            )
        rotation = None
        if self.rope is not None:
            first = KVCache() if cache is None else cache[0]
            rotation = self.rope.at(first.positions(tokens.shape[1], tokens.device))
        step = Step(rotation, cache, return_routing)
        x = self.trunk(self.embed_tokens(tokens), step, last)
        out = self._head(x) if head else x
        return out if step.routing is None else LMOutput(out, step.routing)

    def _head(self, x: Tensor) -> Tensor:
        if self.lm_head is None:
            return F.linear(x, self.embed_tokens.weight)
        logits: Tensor = self.lm_head(x)
        return logits

    @property
    def head_weight(self) -> Tensor:
        """Returns the output weight, [V, H]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        """Applies blocks and the last norm to embedded tokens [B, S, H]; returns the hidden states
        [B, S', H] of the `last` positions or of all."""
        for index, layer in enumerate(self.layers):
            x = layer(x, step, index)
        if last is not None:
            x = x[:, -last:]
        out: Tensor = self.norm(x)
        return out

    # Training.

    def auxiliary_losses(self) -> Mapping[str, AuxLoss]:
        """Returns auxiliary losses by name: functions of one `Routed`, the number of sequences and
        a token mask."""
        return OF_LAYERS

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        token_mask: Tensor | None = None,
        coefficients: Mapping[str, float] | None = None,
        group: Any = None,
    ) -> LMLoss:
        """Computes the next-token cross-entropy plus the auxiliary losses of routing.

        Args:
            tokens: [B, S].
            targets: [B, S], the token after each; None: `tokens` shifted by one; the model then
                runs on the first S - 1 tokens.
            token_mask: bool like the model's input, True where a token counts in both losses.
            coefficients: name -> coefficient, instead of the config's. With coefficient 0 a loss
                is computed and returned, and adds nothing.
            group: process group over whose tokens the auxiliary losses balance experts; None: this
                process only. The cross-entropy covers this process's tokens.

        Raises:
            ValueError: an unknown auxiliary loss.
        """
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if token_mask is not None:
                token_mask = token_mask[:, :-1]
        weights = self.config.aux_coefficients() if coefficients is None else coefficients
        functions = self.auxiliary_losses()
        unknown = [name for name in weights if name not in functions]
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: coefficients must be of losses among "
                f"{', '.join(functions)}, got {', '.join(unknown)}."
            )
        output = self(tokens, return_routing=True, head=False)
        cross_entropy = head_cross_entropy(
            output.logits.flatten(0, 1),
            self.head_weight,
            targets.flatten().long(),
            None if token_mask is None else token_mask.flatten(),
        )
        total, aux = cross_entropy, {}
        for name, weight in weights.items():
            aux[name] = (
                sum_over_layers(
                    name, functions[name], output.routing, tokens.shape[0], token_mask, group
                )
                if output.routing
                else cross_entropy.new_zeros(())
            )
            if weight:
                total = total + weight * aux[name]
        return LMLoss(total, cross_entropy, aux, output.routing)

    # Generation.

    def new_cache(self) -> list[KVCache]:
        """Returns an empty cache for a sequence of calls, one entry per layer."""
        return [KVCache() for _ in self.layers]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        num_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Continues each sequence, with a KV cache.

        Args:
            tokens: [B, S], S >= 1, prompts of one length (there is no padding).
            num_tokens: maximum number of tokens to add.
            temperature: 0 takes the most likely token; otherwise tokens are drawn from
                softmax(logits / temperature).
            top_k: draw from the k most likely tokens.
            top_p: draw from the smallest set of tokens that has this probability.
            stop_token: a sequence that has produced it is filled with it, and generation ends when
                all have.
            generator: for the draws.
            logits_processor: called at each step with the tokens so far [B, S] and the logits [B,
                V] of the next one; returns the logits to use, as in transformers.

        Returns:
            [B, S + n], n <= num_tokens: the prompts and the added tokens.

        Raises:
            ValueError: an empty prompt, or options out of range.
        """
        name = f"{type(self).__name__}.generate"
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"{name}: tokens must be [B, S] with S >= 1, got shape {list(tokens.shape)}."
            )
        check_least(name, "temperature", temperature, 0)
        check_least(name, "top_k", 1 if top_k is None else top_k, 1)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"{name}: top_p must be in (0, 1], got {top_p}.")
        training = self.training
        self.eval()
        try:
            cache, pieces, new = self.new_cache(), [tokens], tokens
            done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for _ in range(num_tokens):
                logits = self(new, cache=cache, last=1)[:, -1]
                if logits_processor is not None:
                    logits = logits_processor(torch.cat(pieces, dim=1), logits)
                new = _next_token(logits, temperature, top_k, top_p, generator)
                new = new.to(tokens.dtype)
                if stop_token is not None:
                    new = new.masked_fill(done[:, None], stop_token)
                    done |= new[:, 0] == stop_token
                pieces.append(new)
                if stop_token is not None and bool(done.all()):
                    break
            return torch.cat(pieces, dim=1)
        finally:
            self.train(training)

    # Checkpoints.

    def entries(self) -> list[Entry]:
        """Returns each tensor of the model with its keys in published checkpoints."""
        entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
        for i, block in enumerate(self.layers):
            entries += self.block_entries(block, f"layers.{i}", f"model.layers.{i}")
        entries.append(Entry("norm.weight", ("model.norm.weight",)))
        if self.lm_head is not None:
            entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
        return entries

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        """Returns entries of a block, given its prefix in the model and in the checkpoint."""
        raise NotImplementedError


def _next_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Returns the next tokens [B, 1] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scores, order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = scores.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        share = probabilities / probabilities.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(share.cumsum(-1) - share >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
