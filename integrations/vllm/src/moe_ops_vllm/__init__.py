"""Runs the experts of vLLM's CPU engine on moe_ops.

vLLM calls `register` in each of its processes (entry point group "vllm.general_plugins").
MOE_OPS_VLLM=0 turns the plugin off.
"""

from __future__ import annotations

import importlib.metadata
import os

__all__ = ["register"]
__version__ = importlib.metadata.version("torch-moe-ops-vllm")


def register() -> None:
    """Makes vLLM build the classes of `moe_ops_vllm.layers` for its layers of experts, and adds
    kernels of dense layers.

    It may be called several times. It does nothing with MOE_OPS_VLLM=0, and on other platforms than
    the CPU. A class that another plugin has replaced stays with that plugin, with a warning.
    """
    if os.environ.get("MOE_OPS_VLLM", "1") == "0":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.quantization import register_quantization_config

    import moe_ops
    from moe_ops_vllm import linears
    from moe_ops_vllm.checkpoints import MoeOpsConfig
    from moe_ops_vllm.layers import CLASSES, logger

    register_quantization_config("moe_ops")(MoeOpsConfig)
    linears.register()
    classes = dict(CLASSES)
    if moe_ops.is_batch_invariant_enabled():
        from moe_ops_vllm import batch_invariant

        classes |= batch_invariant.CLASSES
        batch_invariant.register_attention()
    for name, cls in classes.items():
        found = op_registry_oot.get(name)
        if found is None:
            cls.register_oot(name=name)(cls)
        elif found is not cls:
            logger.warning(
                "%s does not run on moe_ops: another plugin has replaced it by %s.", name, found
            )
