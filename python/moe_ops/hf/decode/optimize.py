"""Switching a whole model to inference kernels, and back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from moe_ops._verify import parse as parse_verify
from moe_ops._verify import watch
from moe_ops.hf.decode import step
from moe_ops.hf.decode.fused import set_fused
from moe_ops.hf.decode.known_parts import LayerParts
from moe_ops.hf.decode.report import Report
from moe_ops.hf.decode.stock import take_stock
from moe_ops.hf.experts.switch import enable, interface_of, set_implementation
from moe_ops.layers.linear import replace_linears
from moe_ops.memory import register_holder, release_file_pages
from moe_ops.quant import QuantizedExperts, WeightConfig, quantize
from moe_ops.quant.bank import find_banks
from moe_ops.quant.config import check_config, check_model
from moe_ops.quant.linear import quantize_linears

_CONFIG_ATTRIBUTES = ("hf_quantizer", "is_quantized", "quantization_method")


class _Module(NamedTuple):
    """Original state of a module."""

    cls: type
    attributes: dict[str, Any]
    children: dict[str, nn.Module | None]


class _Before(NamedTuple):
    """Original state of a model, and its modules by name after `optimize`."""

    modules: dict[str, _Module] | None  # None: weights were not kept.
    after: dict[str, weakref.ref[nn.Module]]
    implementations: dict[str, Any]
    attributes: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]
    kept_bytes: int


# Only one thread at a time changes the modules of models.
_lock = threading.RLock()
_optimized: weakref.WeakKeyDictionary[nn.Module, _Before] = weakref.WeakKeyDictionary()
register_holder("original weights", lambda: sum(b.kept_bytes for b in _optimized.values()))


def optimize(
    model: nn.Module,
    *,
    quantization: WeightConfig | None = None,
    keep_original: bool = False,
    compile: bool | str = False,
    verify: int | str | None = None,
) -> Report:
    """Switches a whole transformers model to inference kernels, in place.

    - Experts run on moe_ops (:func:`moe_ops.hf.enable`).
    - Dense layers (attention projections, shared experts, the head): GEMMs with up to 64 rows run
      at memory bandwidth. With `quantization`, dense layers and experts (`moe_ops.quantize`)
      are quantized. Routers, embeddings, norms, and `kv_b_proj` of MLA stay float.
    - RMS norms and routers are one or two ops each; a decoder layer processes few tokens in a few
      calls, its attention in one.
    - With `compile`, `generate` uses a static cache and compiles its decode steps.

    The formulas of norms, routers, networks, attention and layers are identified by the code of
    their class. Unknown classes, subclasses and modules with a patched forward are left unchanged,
    and the report states the reason; `moe_ops.hf.register_norm` and similar functions register
    classes. Settings are read at each call, so changes take effect immediately.

    In the batch-invariant mode (`moe_ops.set_batch_invariant`), dense layers, networks, norms and
    routers run on the mode's ops for any number of rows, with gradients, and layers call their
    submodules. With the attention implementation "moe_ops", which the mode needs, results then do
    not depend on the batch.

    The attention implementation is unchanged. Parameters, their names and checkpoints are those of
    the model; with `quantization`, `save_pretrained` writes quantized experts and dense layers like
    `quantize`, but for a head that is tied to the embedding. Such a model loads at the speed of
    reading its bytes.

    Args:
        model: a transformers model, or any module with MoE blocks of one.
        quantization: `moe_ops.quant.Int8WeightConfig()` or another config. Dense layers whose rows
            its groups do not divide use the next smaller group, and stay float if none does.
        keep_original: with `quantization`, keep the float weights in memory, so that
            :func:`restore` can bring them back; `moe_ops.memory.memory_stats` counts them.
        compile: True, or the name of a torch.compile backend; stored in `model.generation_config`.
            Assisted decoding needs a cache that is not static.
        verify: n compares one in n calls of each changed module with the module's own forward, and
            raises if they differ by more than rounding; "warn:n" warns. None is the environment
            variable MOE_OPS_VERIFY, or 0.

    Returns:
        Name of each changed module -> its new implementation; `left` has the reasons for unchanged
        modules of these kinds.

    Raises:
        ValueError: unknown `quantization` or `verify`, a model that is already optimized, whose
            experts are quantized to another format, or that cannot generate although `compile` is
            set; models that `enable` and `quantize` reject.
    """
    if quantization is not None:
        check_config("optimize", quantization)
    check_model("optimize", model)
    every, warn = parse_verify(verify)
    with _lock:
        if model in _optimized:
            raise ValueError("optimize: model must not be optimized already; call restore first.")
        if compile and getattr(model, "generation_config", None) is None:
            raise ValueError(
                f"optimize: model must be one that generates to compile its steps, got "
                f"{type(model).__name__}."
            )
        if quantization is not None and not _experts_are(model, quantization.label):
            formats = {m.format for m in model.modules() if isinstance(m, QuantizedExperts)}
            if formats:
                raise ValueError(
                    "optimize: quantization must be None or the format of experts that are "
                    f"quantized already, {', '.join(sorted(formats))}, got {quantization.label}; "
                    "load the float model for another format."
                )
        report = _optimize(model, quantization, keep_original, compile)
        if every:
            watch(_watched(model, report), every, warn)
        return report


def _optimize(
    model: nn.Module,
    quantization: WeightConfig | None,
    keep_original: bool,
    compile: bool | str,
) -> Report:
    keeps = quantization is None or keep_original
    before = _Before(
        modules=dict(_snapshot(model)) if keeps else None,
        after={},
        implementations=_implementations(model),
        attributes={n: model.__dict__[n] for n in _CONFIG_ATTRIBUTES if n in model.__dict__},
        config=dict(model.config.__dict__) if isinstance(model, PreTrainedModel) else {},
        generation=_generation(model),
        kept_bytes=0,
    )
    held = {p.data_ptr(): p.nbytes for p in model.parameters()} if keep_original else {}

    found = take_stock(model)
    report = Report()
    if quantization is not None and not _experts_are(model, quantization.label):
        quantize(model, quantization)
    report |= enable(model)
    if quantization is not None:
        report |= quantize_linears(model, quantization)
        if not keep_original:
            release_file_pages()  # Of the floats that were read from a mapped checkpoint.
    report |= replace_linears(model)
    for name, module in model.named_modules():
        for kind, entries in (("norm", found.norms), ("router", found.routers)):
            if name in entries:
                set_fused(module, kind, entries[name])
                report[name] = f"fused {kind}"
        if name in found.layers:
            parts = found.layers[name]
            set_fused(module, step.KIND, parts)
            report[name] = f"fused {step.KIND}"
            for network, inner in parts.networks(module):
                set_fused(network, "network", inner.entry)
    report.left.update(found.left)
    if compile:
        _compile_steps(model, "inductor" if compile is True else compile)
    for p in model.parameters():
        held.pop(p.data_ptr(), None)
    after = {name: weakref.ref(module) for name, module in model.named_modules() if name}
    _optimized[model] = before._replace(after=after, kept_bytes=sum(held.values()))
    return report


def is_optimized(model: nn.Module) -> bool:
    """Returns whether `optimize` has changed a model and nothing has restored it."""
    return model in _optimized


def restore(model: nn.Module) -> None:
    """Undoes :func:`optimize`: restores the original modules, parameters and settings.

    Raises:
        ValueError: a model that is not optimized, whose float weights were not kept, or whose
            modules have changed since (for instance by adapters: remove them first).
    """
    with _lock:
        _restore(model)


def _restore(model: nn.Module) -> None:
    before = _optimized.get(model)
    if before is None:
        raise ValueError(f"restore: model must be optimized, got {type(model).__name__}.")
    if before.modules is None:
        raise ValueError(
            "restore: model must have its float weights, which optimize(quantization=...) lets go; "
            "give it keep_original=True, or load the model again."
        )
    now = {name: module for name, module in model.named_modules() if name}
    changed = before.after.keys() ^ now.keys()
    changed |= {n for n in before.after.keys() & now.keys() if before.after[n]() is not now[n]}
    if changed:
        raise ValueError(
            f"restore: model must have the modules that optimize left, got another "
            f"{min(changed)!r}; remove adapters and hooks first."
        )
    _put_back(model, "", before.modules)
    for name in _CONFIG_ATTRIBUTES:
        model.__dict__.pop(name, None)
    model.__dict__.update(before.attributes)
    if isinstance(model, PreTrainedModel):
        model.config.__dict__.clear()
        model.config.__dict__.update(before.config)
    for name, implementation in before.implementations.items():
        set_implementation(model.get_submodule(name), implementation)
    for name, value in before.generation.items():
        setattr(model.generation_config, name, value)
    del _optimized[model]


def _experts_are(model: nn.Module, format: str) -> bool:
    """Returns whether all experts have this format already, as after loading such a checkpoint."""
    found = [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    fits = all(m.format == format for m in found)
    return bool(found) and fits and next(find_banks(model, ()), None) is None


def _watched(model: nn.Module, report: Report) -> dict[str, nn.Module]:
    """Returns the modules whose calls can be compared, by name."""
    found = {}
    for name, module in model.named_modules():
        if name in report and not report[name].startswith("fused layer"):
            found[name] = module
        parts = getattr(module, "_moe_ops_fused", None)
        if isinstance(parts, LayerParts):
            inner = ["self_attn"] if parts.attention is not None else []
            form = parts.layer.entry
            if parts.network is not None:
                inner.append(form.block)
            if parts.shared is not None and parts.block is not None:
                block: Any = module._modules[form.block]
                inner.append(f"{form.block}.{parts.block.entry.shared_of(block)}")
            found |= {f"{name}.{part}": module.get_submodule(part) for part in inner}
    return found


def _compile_steps(model: Any, backend: str) -> None:
    config = CompileConfig(fullgraph=False, dynamic=False, backend=backend, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = config


def _generation(model: Any) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    names = ("cache_implementation", "compile_config")
    return {} if config is None else {name: getattr(config, name, None) for name in names}


def _implementations(model: nn.Module) -> dict[str, Any]:
    named = ((name, m) for name, m in model.named_modules() if interface_of(m) is not None)
    return {name: getattr(m.config, "_experts_implementation", None) for name, m in named}


def _snapshot(model: nn.Module) -> Iterator[tuple[str, _Module]]:
    for name, m in model.named_modules():
        private = {key: value for key, value in m.__dict__.items() if key.startswith("_moe_ops")}
        yield name, _Module(type(m), private, dict(m._modules))


def _put_back(module: nn.Module, name: str, modules: dict[str, _Module]) -> None:
    was = modules.get(name)
    if was is None:  # Another name of a restored module.
        return
    module.__class__ = was.cls
    for key in [k for k in module.__dict__ if k.startswith("_moe_ops")]:
        del module.__dict__[key]
    module.__dict__.update(was.attributes)
    # Parameters and buffers of these modules were not replaced, and may have changed since.
    module._modules.clear()
    module._modules.update(was.children)
    for key, child in was.children.items():
        if child is not None:
            _put_back(child, f"{name}.{key}" if name else key, modules)
