"""The parts of vLLM that the plugin relies on, read from its sources without an import.

They are read from the installed vLLM and from the folders in MOE_OPS_VLLM_SOURCES, separated by
colons: unpacked wheels, in which `vllm` is a folder.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "src" / "moe_ops_vllm"
EXPERTS = "model_executor.layers.fused_moe"
# Functions that the plugin overrides or calls by position -> their parameters. "..." allows others.
SIGNATURES = {
    (f"{EXPERTS}.routed_experts", "RoutedExperts._get_quant_method"): (
        "self prefix quant_config moe_config"
    ),
    (f"{EXPERTS}.routed_experts", "RoutedExperts.__init__"): (
        "... swiglu_limit swiglu_alpha swiglu_beta apply_router_weight_on_input"
    ),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase.apply"): (
        "self layer x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase.__init__"): "self moe",
    (f"{EXPERTS}.routed_experts_capturer", "RoutedExpertsCapturer.__init__"): (
        "self max_num_batched_tokens vllm_config"
    ),
    (f"{EXPERTS}.routed_experts_capturer", "bind_routed_experts_capturer"): "model capturer",
    (f"{EXPERTS}.router.base_router", "BaseRouter.set_capture_fn"): "self capture_fn",
    ("distributed.aux_output_connector.worker", "AuxOutputWorkerConnector.__init__"): (
        "self vllm_config model kv_cache_config"
    ),
    ("distributed.aux_output_connector.worker", "AuxOutputWorkerConnector.begin_step"): (
        "self metadata"
    ),
    ("distributed.aux_output_connector.worker", "AuxOutputWorkerConnector.prepare_output"): (
        "self input_batch"
    ),
    ("distributed.aux_output_connector.worker", "PendingAuxOutput.enqueue_cpu_copy"): (
        "self num_sampled num_rejected"
    ),
    ("distributed.aux_output_connector.worker", "PendingAuxOutput.process_output"): "self",
    ("v1.worker.gpu_worker", "Worker.load_model"): "self load_dummy_weights",
    ("v1.worker.gpu_worker", "Worker.initialize_from_config"): "self kv_cache_config",
    ("v1.worker.gpu_worker", "Worker.execute_model"): "self scheduler_output",
    ("v1.worker.gpu_worker", "Worker.sample_tokens"): "self grammar_output",
    ("v1.core.sched.scheduler", "Scheduler.__init__"): "self vllm_config ...",
    ("model_executor.layers.linear", "LinearMethodBase.apply"): "self layer x bias",
    ("model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply"): (
        "self layer x bias"
    ),
    ("v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder.build"): (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    ("v1.attention.backends.registry", "register_backend"): "backend class_path ...",
    ("model_executor.custom_op", "PluggableLayer.register_oot"): "cls _decorated_layer_cls name",
}
# Fields of classes that the plugin sets or reads.
FIELDS = {
    ("v1.outputs", "ModelRunnerOutput"): "aux_output_connector_output sampled_token_ids",
    ("v1.core.sched.output", "SchedulerOutput"): (
        "aux_output_connector_metadata num_scheduled_tokens scheduled_spec_decode_tokens"
    ),
    ("v1.attention.backend", "CommonAttentionMetadata"): (
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len"
        " block_table_tensor causal"
    ),
    ("v1.attention.backends.registry", "AttentionBackendEnum"): "CPU_ATTN",
    ("model_executor.layers.fused_moe.activation", "MoEActivation"): (
        "SILU GELU GELU_TANH SWIGLUOAI SWIGLUOAI_UNINTERLEAVE SILU_NO_MUL GELU_NO_MUL"
        " GELU_TANH_NO_MUL RELU2_NO_MUL"
    ),
}


def sources() -> list[Path]:
    """The folders `vllm` to be read."""
    found = [Path(p) / "vllm" for p in os.environ.get("MOE_OPS_VLLM_SOURCES", "").split(":") if p]
    installed = importlib.util.find_spec("vllm")
    if installed is not None and installed.submodule_search_locations:
        found.append(Path(installed.submodule_search_locations[0]))
    return found


pytestmark = pytest.mark.skipif(not sources(), reason="vLLM is not installed")


@pytest.fixture(params=sources(), ids=str)
def vllm(request) -> Path:
    return request.param


@cache
def module(folder: Path, name: str) -> ast.Module:
    path = folder.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"vllm.{name} does not exist"
    return ast.parse(file.read_text())


def bound(tree: ast.AST) -> set[str]:
    """The names that a module or class binds, conditions and the like included."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            names |= bound(node)
    return names


def found(folder: Path, name: str, path: str) -> ast.AST:
    """A class or function of a module, by its name within the module."""
    node: ast.AST = module(folder, name)
    for part in path.split("."):
        inner = {
            n.name: n
            for n in ast.iter_child_nodes(node)
            if isinstance(n, ast.ClassDef | ast.FunctionDef)
        }
        assert part in inner, f"vllm.{name} has no {path}"
        node = inner[part]
    return node


def imports() -> Iterator[tuple[str, str]]:
    """Modules of vLLM, and the names that the plugin imports from them."""
    for file in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                for alias in node.names:
                    yield node.module.removeprefix("vllm."), alias.name


@pytest.mark.parametrize(("name", "item"), sorted(set(imports())))
def test_import(vllm, name, item):
    # The package vllm.platforms makes this one when it is first asked for.
    assert item in bound(module(vllm, name)) | {"current_platform"}


@pytest.mark.parametrize(("where", "expected"), SIGNATURES.items(), ids=lambda v: str(v)[:80])
def test_signature(vllm, where, expected):
    arguments = found(vllm, *where).args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    wanted = expected.split()
    if "..." not in wanted:
        assert names == wanted
    elif wanted[0] == "...":
        assert set(wanted[1:]) <= set(names)
    else:
        assert names[: len(wanted) - 1] == wanted[:-1]


@pytest.mark.parametrize(("where", "expected"), FIELDS.items(), ids=lambda v: str(v)[:80])
def test_fields(vllm, where, expected):
    assert set(expected.split()) <= bound(found(vllm, *where))
