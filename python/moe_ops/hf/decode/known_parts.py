"""Known submodules of a model, determined once when it is optimized."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from moe_ops.hf.decode import agreement
from moe_ops.hf.models.known import Unknown, code_of, entry_of, find, own_class
from moe_ops.hf.models.layers import DecoderLayer
from moe_ops.hf.models.source import Code, is_of_transformers


class Found(NamedTuple):
    """A known submodule.

    entry: the formula that it computes.
    cls, code: its class, and the code of the class.
    """

    entry: Any
    cls: type
    code: Code | None

    def is_still(self, module: nn.Module) -> bool:
        """Returns False if the module has another class by now."""
        return own_class(type(module)) is self.cls


class LayerParts:
    """A decoder layer and its known submodules; None stands for an unknown one.

    layer: the layer itself.
    attention, block, network, shared: self_attn; the block, which is experts or a dense network;
    the shared network beside the experts.
    left: name of a submodule -> reason for which it is called instead of computed here.
    """

    def __init__(
        self,
        layer: Found,
        attention: Found | None,
        block: Found | None,
        network: Found | None,
        shared: Found | None,
        left: dict[str, str],
    ) -> None:
        self.layer, self.attention, self.left = layer, attention, left
        self.block, self.network, self.shared = block, network, shared
        self._watched: tuple[Code, Collection[type]] | None = None

    def networks(self, layer: Any) -> Iterator[tuple[nn.Module, Found]]:
        """Yields the dense networks of the layer: its block, or the shared experts of its block."""
        block = layer._modules[self.layer.entry.block]
        if self.network is not None:
            yield block, self.network
        if self.shared is not None and self.block is not None:
            yield block._modules[self.block.entry.shared_of(block)], self.shared

    def intact(self, layer: nn.Module) -> Collection[type] | None:
        """Returns the fused classes of the layer; None if the code of any submodule was
        replaced."""
        if self._watched is None:
            self._watched = self._watch(layer)
        code, classes = self._watched
        return classes if code.is_intact() else None

    def _watch(self, layer: nn.Module) -> tuple[Code, Collection[type]]:
        """Returns the code of all submodules, each function once, and the fused classes."""
        classes = {type(m) for m in layer.modules() if "_moe_ops_kind" in type(m).__dict__}
        codes = [found.code for name in _KINDS if (found := getattr(self, name)) is not None]
        codes += [cls.__dict__["_moe_ops_code"] for cls in classes]
        functions: dict[Any, Any] = {}
        for code in codes:
            for owner, name, function in () if code is None else code.functions:
                functions[id(owner), name] = (owner, name, function)
        return Code("", tuple(functions.values())), frozenset(classes)

    def __deepcopy__(self, memo: Any) -> LayerParts:
        return self  # It is immutable.

    def __getstate__(self) -> dict[str, Any]:
        # Functions are not pickled but looked up again.
        state = {**self.__dict__, "_watched": None}
        for name in _KINDS:
            if (found := state[name]) is not None:
                state[name] = found.entry, found.cls
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, kind in _KINDS.items():
            if state[name] is not None:
                setattr(self, name, _found_again(kind, *state[name]))


_KINDS = {
    "layer": "layer",
    "attention": "attention",
    "block": "block",
    "network": "network",
    "shared": "network",
}


def _found_again(kind: str, entry: Any, cls: type) -> Found | None:
    """Returns a submodule of a pickled model, if the installed transformers computes it like the
    release that wrote it."""
    try:
        same = entry_of(kind, cls) == entry
    except Unknown:
        same = False
    return Found(entry, cls, code_of(cls)) if same else None


class Inventory:
    """Looks up modules of one model, and remembers which classes have been compared."""

    def __init__(self) -> None:
        self._compared: dict[Any, str | None] = {}

    def find(self, kind: str, module: nn.Module) -> Found:
        """Returns the formula of a module.

        Raises:
            Unknown: it is unknown, or does not agree with the formula of its class.
        """
        entry = find(kind, module)
        reason = self._why_not(kind, module, entry)
        if reason is not None:
            raise Unknown(reason)
        return Found(entry, type(module), code_of(own_class(type(module))))

    def _why_not(self, kind: str, module: nn.Module, entry: Any) -> str | None:
        if not is_of_transformers(own_class(type(module))):
            return agreement.why_not(kind, module, entry)
        # Modules of one class with known code differ only in sizes and settings.
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        key = kind, own_class(type(module)), entry, shapes
        if key not in self._compared:
            self._compared[key] = agreement.why_not(kind, module, entry)
        return self._compared[key]

    def layer_parts(self, layer: Any) -> LayerParts:
        """Returns the known submodules of a decoder layer.

        Raises:
            Unknown: the layer, or all of its submodules, are unknown.
        """
        found = self.find("layer", layer)
        form: DecoderLayer = found.entry
        parts = layer._modules
        left: dict[str, str] = {}
        norms = {n: self._try("norm", parts[n], left, n) for n in _NORMS}
        attention = block = network = shared = None
        if norms["input_layernorm"] is not None:
            attention = self._try("attention", parts["self_attn"], left, "self_attn")
        if norms["post_attention_layernorm"] is not None:
            name = form.block
            if "experts" in parts[name]._modules:
                block = self._try("block", parts[name], left, name)
            else:
                network = self._try("network", parts[name], left, name)
        if block is not None and block.entry.pair != form.pair:
            left[form.block] = "the layer and its block do not agree on what the block returns"
            block = None
        if network is not None and form.pair:
            left[form.block] = "the layer takes a pair from its block"
            network = None
        if block is not None:
            shared_name = block.entry.shared_of(parts[form.block])
            if shared_name is not None:
                inner = parts[form.block]._modules[shared_name]
                shared = self._try("network", inner, left, f"{form.block}.{shared_name}")
        if attention is None and block is None and network is None:
            raise Unknown("; ".join(f"{name}: {reason}" for name, reason in left.items()))
        return LayerParts(found, attention, block, network, shared, left)

    def _try(self, kind: str, module: nn.Module, left: dict[str, str], name: str) -> Found | None:
        try:
            return self.find(kind, module)
        except Unknown as error:
            left[name] = str(error)
            return None


_NORMS = ("input_layernorm", "post_attention_layernorm")
