"""vLLM's layers of experts, with a method of moe_ops where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.dbrx import DbrxExperts
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

import moe_ops
from moe_ops_vllm.base import mark
from moe_ops_vllm.checkpoints import MoeOpsQuantized
from moe_ops_vllm.methods import StaysWithVllm, method_for

# A name below vLLM's, so that its handlers print the lines.
logger = init_logger("vllm.moe_ops")


class _OnMoeOps:
    """The part of a layer that chooses its method."""

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: Any
    ) -> FusedMoEMethodBase:
        config = get_current_vllm_config()
        try:
            method = method_for(self, prefix, quant_config, moe_config, config)
        except StaysWithVllm as reason:
            logger.info_once("Experts stay with vLLM's own kernels: %s.", str(reason))
            parent: Any = super()
            return parent._get_quant_method(prefix, quant_config, moe_config)
        mark(config)
        logger.info_once("Experts run on moe_ops %s: %s.", moe_ops.__version__, method.label)
        return method

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        layer: Any = self
        if not isinstance(layer.quant_method, MoeOpsQuantized):
            parent: Any = super()
            yield from parent.load_weights(weights)
            return
        for name, tensor in weights:
            yield layer.quant_method.load(layer, name, tensor)


# vLLM's class -> the class to build in its place. Subclasses differ in what they load.
CLASSES: dict[str, Any] = {
    cls.__name__: type(f"MoeOps{cls.__name__}", (_OnMoeOps, cls), {})
    for cls in (RoutedExperts, GptOssRoutedExperts, DbrxExperts)
}
