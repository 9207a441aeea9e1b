"""What the language models of the zoo have in common: the trunk, losses, generation, checkpoints.

Letters: B sequences, S tokens of each, T = B * S, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops import _files
from moe_ops._fields import check_names
from moe_ops.layers import KVCache, Router
from moe_ops.layers.rotary import Rope
from moe_ops.memory import available_memory

from . import checkpoint
from .blocks import Step, apply_norm
from .checkpoint import Entry, LoadReport
from .config import LMConfig
from .cross_entropy import head_cross_entropy
from .embedding import TokenEmbedding
from .graph import DecodingGraph
from .losses import OF_LAYERS, AuxLoss, Routed, sum_over_layers
from .offloading import leave_experts
from .sampling import next_token

# Entry of config.json for fields of ours that have no published name.
OWN_FIELDS = "moe_ops"
# Fields of configs that are no sizes of tensors: tokens that a model was trained on.
FREE_FIELDS = ("context",)
_CANNOT_BE_BUILT = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class LMOutput(NamedTuple):
    """logits [B, S, V] and the routing of every routed layer, in the order of computation."""

    logits: Tensor
    routing: list[Routed]


class LMLoss(NamedTuple):
    """What training minimises, and its parts.

    loss: cross_entropy plus each auxiliary loss times its coefficient, a scalar.
    cross_entropy: mean over the predicted tokens, in nats.
    aux_losses: name -> sum over routed layers, not multiplied by its coefficient.
    routing: as in LMOutput.
    """

    loss: Tensor
    cross_entropy: Tensor
    aux_losses: dict[str, Tensor]
    routing: list[Routed]


Model = TypeVar("Model", bound="CausalLM")


class CausalLM(nn.Module):
    """A decoder: embedding, blocks, a norm, and the logits of the next token.

    A subclass calls `assemble` with its blocks, each of which takes (x, step, index) and returns x,
    and says in `block_entries` how the tensors of a block are called in published checkpoints.
    """

    # Keys of published checkpoints that are of no use here, as regular expressions.
    ignored_keys: tuple[str, ...] = (r"rotary_emb\.inv_freq",)
    config_class: ClassVar[type[LMConfig]]

    config: Any  # An instance of `config_class`.
    embed_tokens: nn.Embedding
    layers: Any  # ModuleList of the subclass's blocks.
    norm: nn.Module
    lm_head: nn.Linear | None
    rope: Rope | None
    load_report: LoadReport | None = None
    expert_cache: Any = None  # Of `from_pretrained(offload=...)`.

    def assemble(
        self, config: Any, blocks: Iterable[nn.Module], norm: nn.Module, rope: Rope | None
    ) -> None:
        """Makes the trunk, with fresh weights.

        Args:
            config: with `vocab_size`, `hidden_size`, and `tie_embeddings` where the embedding can
                also be the output's weight.
            blocks: made one after the other, after the embedding.
            norm: the last one.
            rope: None without positions.
        """
        self.config = config
        self.rope = rope
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm
        self.lm_head = None
        if not getattr(config, "tie_embeddings", False):
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), norms 1, biases 0."""
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
        """Logits of the next token, [B, S, V], or an LMOutput with `return_routing=True`.

        Args:
            tokens: [B, S] integers in [0, V).
            cache: of `new_cache`, holding the tokens before these; these are appended.
            return_routing: also return what every router chose.
            last: logits of the last so many positions only.
            head: False: in place of logits the hidden states [B, S, H] that the head reads.

        Raises:
            ValueError: tokens that are not two-dimensional integers.
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
        """[V, H]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        """Blocks and last norm: embedded tokens [B, S, H] to the hidden states [B, S', H] that the
        output's weight reads, of the `last` positions or of all."""
        for index, layer in enumerate(self.layers):
            x = layer(x, step, index)
        if last is not None:
            x = x[:, -last:]
        return apply_norm(self.norm, x)

    # ------------------------------------------------------------------------------- training

    def auxiliary_losses(self) -> Mapping[str, AuxLoss]:
        """Name -> function of one `Routed`, the number of sequences and a token mask."""
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
        """Cross-entropy of the next token plus the auxiliary losses of routing.

        Args:
            tokens: [B, S].
            targets: [B, S], the token after each; None: `tokens` moved by one, and the model then
                runs on the first S - 1 tokens.
            token_mask: bool like the model's input, True where a token counts in both losses.
            coefficients: name -> coefficient, instead of the config's. With coefficient 0 a loss
                is computed and returned, and adds nothing.
            group: process group over whose tokens the auxiliary losses balance experts; None is
                this process. The cross-entropy is of this process's tokens.

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

    # ----------------------------------------------------------------------------- generation

    def new_cache(self) -> list[KVCache]:
        """An empty cache for a sequence of calls, one a layer."""
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
        graph: DecodingGraph | None = None,
    ) -> Tensor:
        """Continues each sequence, with a cache of keys and values.

        Args:
            tokens: [B, S], S >= 1, prompts of one length (there is no padding).
            num_tokens: tokens to add at most.
            temperature: 0 takes the likeliest token; otherwise tokens are drawn from
                softmax(logits / temperature).
            top_k: draw from the k likeliest only.
            top_p: draw from the smallest set of tokens that has this probability.
            stop_token: a sequence that has produced it goes on with it alone, and generation ends
                when all have.
            generator: for the draws.
            logits_processor: called at each step with the tokens so far [B, S] and the logits
                [B, V] of the next one; returns the logits to use, as one of transformers does.
            graph: of this model, for a CUDA graph a token.

        Returns:
            [B, S + n], n <= num_tokens: the prompts and what was added.

        Raises:
            ValueError: an empty prompt, or options out of range.
        """
        name = f"{type(self).__name__}.generate"
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"{name}: tokens must be [B, S] with S >= 1, got shape {list(tokens.shape)}."
            )
        if temperature < 0:
            raise ValueError(f"{name}: temperature must be at least 0, got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"{name}: top_k must be at least 1, got {top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"{name}: top_p must be in (0, 1], got {top_p}.")
        training = self.training
        self.eval()
        try:
            cache, pieces, new = self.new_cache(), [tokens], tokens
            done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for i in range(num_tokens):
                if graph is None:
                    logits = self(new, cache=cache, last=1)[:, -1]
                else:
                    logits = graph.start(new) if i == 0 else graph.step(new)
                if logits_processor is not None:
                    logits = logits_processor(torch.cat(pieces, dim=1), logits)
                new = next_token(logits, temperature, top_k, top_p, generator)
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

    # ---------------------------------------------------------------------------- checkpoints

    def entries(self) -> list[Entry]:
        """Each tensor of the model with its keys in published checkpoints."""
        entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
        for i, block in enumerate(self.layers):
            entries += self.block_entries(block, f"layers.{i}", f"model.layers.{i}")
        entries.append(Entry("norm.weight", ("model.norm.weight",)))
        if self.lm_head is not None:
            entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
        return entries

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        """Those of a block, given its name here and there."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        strict: bool = True,
        offload: Mapping[str, Any] | None = None,
        reader: checkpoint.Reader | None = None,
        **overrides: Any,
    ) -> Model:
        """Reads a checkpoint: config.json and safetensors, sharded or not, with published keys.

        Args:
            folder: where they are.
            dtype: of the parameters; None is that of the checkpoint's embedding.
            device: of the parameters.
            strict: a missing key is an error; else the tensors it belongs to keep their initial
                values. Unexpected keys give a warning.
            offload: arguments of `moe_ops.offload.offload_experts`: experts stay in the files, and
                `expert_cache` of the model reads them when they are used. All keys must be there.
            reader: gives the tensors in the place of those of the folder.
            overrides: fields of the config to change.

        Returns:
            The model in eval mode. Its `load_report` says what was missing, unexpected and ignored.

        Raises:
            FileNotFoundError: no config, no tensors, or a file of the index that is not there.
            ValueError: missing keys with `strict`, a tensor whose shape or type does not fit, a
                config that describes something else, or a file that is damaged or lies outside the
                folder. All of it is noticed before memory for the model is taken.
        """
        folder = Path(folder)
        before = _files.stamp(folder / checkpoint.CONFIG)
        published = checkpoint.read_config(folder)
        try:
            config = cls._published_config(published, overrides)
        except ValueError as error:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: in {folder / checkpoint.CONFIG}, {error}"
            ) from error
        reader = checkpoint.Reader(folder) if reader is None else reader
        if _files.stamp(folder / checkpoint.CONFIG) != before:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder} must stay as it is while it is read, "
                "got replaced by another checkpoint; load it again."
            )
        sizes = {name: value for name, value in vars(config).items() if name not in FREE_FIELDS}
        checkpoint.check_sizes(sizes, reader, strict=strict)
        model, entries = cls._without_memory(config, folder)
        report = checkpoint.compare(reader, entries, model.ignored_keys)
        if report.missing and (strict or offload is not None):
            raise ValueError(f"{cls.__name__}.from_pretrained: {report}")
        if report.unexpected:
            warnings.warn(f"{cls.__name__}.from_pretrained: {report}", stacklevel=2)
        if dtype is None:
            first = next((k for k in entries[0].keys if k in reader.keys()), None)
            dtype = torch.float32 if first is None else reader.dtype(first)
        checkpoint.check(model, reader, entries, report)
        if report.missing:
            _check_memory(cls.__name__, model, dtype)
            model = cls(config).to(device=device, dtype=dtype)
        else:
            if offload is not None:
                entries = leave_experts(model, reader, entries, dtype, device, offload)
            model = model.to(dtype).to_empty(device=device)
        checkpoint.load(model, reader, entries, report)
        model.load_report = report
        return model.eval()

    @classmethod
    def _published_config(cls, published: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
        own = published.get(OWN_FIELDS, {})
        if not isinstance(own, dict):
            raise ValueError(f"{OWN_FIELDS} must be an object, got {_files.shown(own)}.")
        check_names(cls.config_class, own, OWN_FIELDS)
        return cls.config_class.from_published(published, **{**own, **overrides})

    @classmethod
    def _without_memory(cls: type[Model], config: Any, folder: Path) -> tuple[Model, list[Entry]]:
        """The model on the meta device.

        Sizes that a file gives may contradict each other in ways that only building shows, such as
        a product beyond 2^63 or a number of heads that does not divide.
        """
        try:
            with torch.device("meta"):
                model = cls(config)
            return model, model.entries()
        except _CANNOT_BE_BUILT as error:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder / checkpoint.CONFIG} must describe a "
                f"model that can be built, got: {str(error).splitlines()[0]}"
            ) from error

    def save_pretrained(self, folder: Path | str, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and safetensors with the published keys and layouts.

        Args:
            folder: made if it is not there. An earlier checkpoint in it is replaced once the new
                one is on the disk.
            max_shard_bytes: tensors of one file, unless a single one is larger.

        Raises:
            OSError: it could not be written; the earlier checkpoint is then still there.
        """
        published = self.config.to_published()
        published["dtype"] = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        # What the published names cannot say, such as coefficients of losses.
        plain = type(self.config).from_published(published)
        own = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(self.config)
            if getattr(self.config, field.name) != getattr(plain, field.name)
        }
        if own:
            published[OWN_FIELDS] = own
        checkpoint.save(self, folder, self.entries(), published, max_shard_bytes=max_shard_bytes)

    # ------------------------------------------------------------------------------- counting

    def num_parameters(self) -> dict[str, int]:
        """All parameters, and those that a token passes through (of K experts in E)."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "active": total - self.idle_parameters()}

    def idle_parameters(self) -> int:
        """Parameters of experts that a token does not use."""
        idle = 0
        for module in self.modules():
            router = getattr(module, "router", None)
            if not isinstance(router, Router):
                continue
            share = 1 - router.top_k / router.num_experts
            experts = getattr(module, "experts", module)
            own = experts.parameters(recurse=experts is not module)
            idle += sum(round(p.numel() * share) for p in own if p.dim() == 3)
        return idle


def _check_memory(name: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Before a model is made whose sizes no tensor of the checkpoint confirms."""
    wanted = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    available = available_memory()
    if 0 < available < wanted:
        raise ValueError(
            f"{name}.from_pretrained: sizes of config.json must fit into the memory where the "
            f"checkpoint lacks tensors, got {wanted} bytes of {available}."
        )
