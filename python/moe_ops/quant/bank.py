"""What a bank of float experts is to the quantiser, wherever its weights live.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_ops._sharded import check_whole, name_of
from moe_ops.ops.moe_ffn import moe_ffn

if TYPE_CHECKING:
    from moe_ops.layers import QuantizedExperts


class BankInputs(NamedTuple):
    """One call of a bank: x [T, H], topk_weights and topk_ids [T, K]."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    apply_router_weight_on_input: bool = False


@dataclass(frozen=True)
class FloatBank:
    """The weights of a bank as views of where they are; nothing is copied to make one.

    gate_up: the rows of w_gate_up [E, 2I, H], or parts of them in order, each [E, rows, H].
    down: [E, H, I]. b_gate_up, b_down: [E, 2I] and [E, H] or None.
    activation: the arguments of moe_ffn that say what is between the products.
    """

    gate_up: tuple[Tensor, ...]
    down: Tensor
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None
    activation: Mapping[str, Any] = field(default_factory=lambda: {"activation": "swiglu"})

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each with the name of what it is, or is a part of, in moe_ffn."""
        yield from (("w_gate_up", w) for w in self.gate_up)
        yield "w_down", self.down
        biases = ("b_gate_up", self.b_gate_up), ("b_down", self.b_down)
        yield from ((name, b) for name, b in biases if b is not None)

    def gate_up_of(self, expert: int) -> Tensor:
        """[2I, H] fp32, a copy of its own."""
        return torch.cat([w[expert].detach().float() for w in self.gate_up])

    def down_of(self, expert: int) -> Tensor:
        """[H, I] fp32."""
        return self.down[expert].detach().float().contiguous()

    def biases_of(self, expert: int) -> dict[str, Any]:
        pairs = (("b_gate_up", self.b_gate_up), ("b_down", self.b_down))
        return {n: b[expert : expert + 1].detach().float() for n, b in pairs if b is not None}

    def run_expert(
        self, expert: int, inputs: BankInputs, w_gate_up: Tensor | None = None
    ) -> Tensor:
        """What one expert adds to the tokens of `inputs`, [T, H] fp32; the weights by choice."""
        w_gate_up = self.gate_up_of(expert) if w_gate_up is None else w_gate_up
        return moe_ffn(
            inputs.x.float(),
            w_gate_up[None],
            self.down_of(expert)[None],
            inputs.topk_weights.float(),
            torch.where(inputs.topk_ids == expert, 0, -1),
            apply_router_weight_on_input=inputs.apply_router_weight_on_input,
            **self.biases_of(expert),
            **self.activation,
        )

    def run(self, inputs: BankInputs) -> Tensor:
        """The bank's output [T, H] in fp32, an expert at a time so that one is copied at most."""
        y = inputs.x.new_zeros(inputs.x.shape[0], self.hidden_size, dtype=torch.float32)
        for expert, tokens in tokens_of(inputs, self.num_experts):
            y[tokens] += self.run_expert(expert, take_tokens(inputs, tokens))
        return y


def tokens_of(inputs: BankInputs, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert in use with the indices of its tokens."""
    for expert in range(num_experts):
        tokens = (inputs.topk_ids == expert).any(-1).nonzero().flatten()
        if tokens.numel():
            yield expert, tokens


def take_tokens(inputs: BankInputs, tokens: Tensor) -> BankInputs:
    return BankInputs(
        inputs.x[tokens],
        inputs.topk_weights[tokens],
        inputs.topk_ids[tokens],
        inputs.apply_router_weight_on_input,
    )


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights(op: str, name: str, module: nn.Module, bank: FloatBank) -> None:
    """Raises ValueError, with the name of the weight, where a bank is not all here to be read.

    Args:
        op: the function that reads it.
        name: of `module`, which holds the bank.
    """
    check_whole_bank(op, name, module, bank)
    shapes = {"w_gate_up": "[E, 2I, H]", "w_down": "[E, H, I]"}
    for role, w in bank.tensors():
        what = _name_of(role, w, name, module)
        if w.device.type == "meta":
            raise ValueError(
                f"{op}: {what} must hold numbers, got a meta tensor; load all weights into memory "
                "first, without offloading any."
            )
        if w.device.type != "cpu":
            raise ValueError(
                f"{op}: {what} must be on the CPU, where quantised experts run, got {w.device}; "
                "call model.cpu() first."
            )
        if w.dtype not in _FLOATS:
            raise ValueError(
                f"{op}: {what} must be float64, float32, bfloat16 or float16, got "
                f"{str(w.dtype).removeprefix('torch.')}."
            )
        if role in shapes and w.dim() != 3:
            raise ValueError(f"{op}: {what} must be {shapes[role]}, got shape {list(w.shape)}.")


def check_whole_bank(op: str, name: str, module: nn.Module, bank: FloatBank) -> None:
    """Raises ValueError where this process has a part of a weight only."""
    for role, w in bank.tensors():
        what = _name_of(role, w, name, module)
        check_whole(op, what, w, f"{op} has to come before the model is sharded")


@torch.no_grad()
def check_finite(op: str, name: str, module: nn.Module, bank: FloatBank) -> None:
    """Raises ValueError, with the name of the weight, where a number is infinite or NaN."""
    for role, w in bank.tensors():
        for expert in range(bank.num_experts):
            if not bool(torch.isfinite(w[expert]).all()):
                raise ValueError(
                    f"{op}: {_name_of(role, w, name, module)} must be finite, got infinities or "
                    f"NaNs in expert {expert}."
                )


def _name_of(role: str, w: Tensor, name: str, module: nn.Module) -> str:
    return name_of(module, w, name) or f"{name or 'the bank'}'s {role}"


class Adapter(Protocol):
    """Knows one kind of module that holds a bank of float experts."""

    def bank(self, module: nn.Module) -> FloatBank | None:
        """The bank of `module`; None for a module of another kind.

        Raises ValueError, with the reason, for a bank of this kind that has no quantised form.
        """

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BankInputs:
        """What a call of `module` with these arguments gives its bank."""

    def new(self, bank: FloatBank, **config: Any) -> QuantizedExperts:
        """A quantised bank of the class that takes this one's place, its buffers not filled."""

    def install(self, root: nn.Module, module: nn.Module, experts: QuantizedExperts) -> nn.Module:
        """Puts `experts` where `module` has its weights; returns the root, which may be new."""


_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    _adapters.append(adapter)


class FoundBank(NamedTuple):
    name: str
    module: nn.Module
    adapter: Adapter
    bank: FloatBank


def find_banks(
    root: nn.Module, skip: tuple[str, ...] = (), *, unsupported: str = "raise"
) -> Iterator[FoundBank]:
    """The float banks of a model, one at a time: whoever drops the last one may free it.

    Args:
        skip: shell patterns of the names of modules to pass over.
        unsupported: "raise" or "skip", what to do about a bank that has no quantised form.

    Raises:
        ValueError: such a bank.
    """
    _load_adapters(root)
    for name in [n for n, _ in root.named_modules()]:
        try:
            module = root.get_submodule(name)
        except AttributeError:  # Was inside a bank that has been replaced.
            continue
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        for adapter in _adapters:
            try:
                bank = adapter.bank(module)
            except ValueError as error:
                if unsupported == "skip":
                    break
                raise ValueError(f"quantize_experts: {name or 'the model'} {error}") from None
            if bank is not None:
                yield FoundBank(name, module, adapter, bank)
                break
        del module
        bank = None


def idle_patterns(root: nn.Module, skip: tuple[str, ...]) -> list[str]:
    """The patterns of `skip` that no bank's name matches."""
    _load_adapters(root)
    idle = set(skip)
    for name, module in root.named_modules() if idle else ():
        here = {pattern for pattern in idle if fnmatchcase(name, pattern)}
        if here and _holds_bank(module):
            idle -= here
    return [pattern for pattern in skip if pattern in idle]


def _holds_bank(module: nn.Module) -> bool:
    for adapter in _adapters:
        try:
            if adapter.bank(module) is not None:
                return True
        except ValueError:  # One that has no quantised form.
            return True
    return False


def _load_adapters(root: nn.Module) -> None:
    import moe_ops.quant.experts  # Registers its adapter, as the other one does.

    if "transformers" in sys.modules:
        try:
            import moe_ops.hf.quantized  # noqa: F401
        except ImportError:  # Too old. No matter for a model that is not of it.
            if is_pretrained(root):
                raise


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a model of transformers, which need not be installed."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts `new` wherever `old` is in `root`: layers may share a bank. Returns the root."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return root
