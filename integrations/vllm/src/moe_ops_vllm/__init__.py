"""Runs the experts of vLLM's CPU engine on moe_ops.

vLLM calls `register` in each of its processes (entry point group "vllm.general_plugins").
MOE_OPS_VLLM=0 turns the plugin off.
"""

from __future__ import annotations

import os

__all__ = ["register"]
__version__ = "0.1.0"


def register() -> None:
    """Makes vLLM build `moe_ops_vllm.layer.MoeOpsRoutedExperts` for each layer of experts.

    It may be called several times. It does nothing with MOE_OPS_VLLM=0, and on other platforms than
    the CPU.
    """
    if os.environ.get("MOE_OPS_VLLM", "1") == "0":
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    name = "RoutedExperts"
    found = op_registry_oot.get(name)
    from moe_ops_vllm.layer import MoeOpsRoutedExperts

    if found is None:
        MoeOpsRoutedExperts.register_oot(name=name)(MoeOpsRoutedExperts)
    elif found is not MoeOpsRoutedExperts:
        from vllm.logger import init_logger

        init_logger("vllm.moe_ops").warning(
            "Experts do not run on moe_ops: another plugin has replaced %s by %s.", name, found
        )
