"""Hugging Face transformers on the ops of moe_ops.

Importing this module registers ``"moe_ops"`` as an experts implementation, so that

    import moe_ops.hf
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ops")

and ``model.set_experts_implementation("moe_ops")`` work for every model whose experts go through
transformers' experts interface. :func:`enable` switches a live model instead, and also JetMoE, DBRX
and Llama 4, whose blocks are outside that interface and ignore the argument silently. It also
registers a quantisation method, so that ``from_pretrained`` reads checkpoints whose experts
`moe_ops.quantize` has quantised, and an attention implementation ``"moe_ops"``, torch's
attention without the masks that would keep JetMoE's attention experts from compiled code. Where
transformers has a registry of expert-parallel implementations (5.23), ``"moe_ops"`` is one.
:func:`load_offloaded` loads models whose experts are larger than the memory.
:func:`optimize` puts a whole model on kernels for inference, dense layers and head included.
"""

from __future__ import annotations

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "moe_ops.hf needs Hugging Face transformers, which is not installed: "
        "pip install torch-moe-ops[hf]"
    ) from error

from moe_ops._requirements import too_old_message, transformers_is_too_old

if transformers_is_too_old(transformers.__version__):
    raise ImportError(too_old_message(transformers.__version__))

from transformers.integrations.moe import ExpertsInterface

from moe_ops.expert_weights import register_hook
from moe_ops.hf.checkpoints import published
from moe_ops.hf.checkpoints.hook import TransformersHook
from moe_ops.hf.checkpoints.offloading import load_offloaded
from moe_ops.hf.checkpoints.quantizer import MoeOpsConfig
from moe_ops.hf.decode import attention
from moe_ops.hf.decode.optimize import optimize, restore
from moe_ops.hf.decode.report import report
from moe_ops.hf.experts.forward import experts_forward
from moe_ops.hf.experts.parallel import Interface, register_ep_implementation
from moe_ops.hf.experts.switch import assert_used, disable, enable, status
from moe_ops.hf.models import (
    register_attention,
    register_block,
    register_layer,
    register_network,
    register_norm,
    register_router,
)
from moe_ops.hf.models.attention import PLAIN_FUNCTIONS

ExpertsInterface.register("moe_ops", experts_forward)
PLAIN_FUNCTIONS.add(attention.attention_forward)
attention.register()
published.install()
if Interface is not None and "moe_ops" not in Interface():  # It is, where this is reloaded.
    register_ep_implementation("moe_ops")
register_hook(TransformersHook())

__all__ = [
    "MoeOpsConfig",
    "assert_used",
    "disable",
    "enable",
    "experts_forward",
    "load_offloaded",
    "optimize",
    "register_attention",
    "register_block",
    "register_ep_implementation",
    "register_layer",
    "register_network",
    "register_norm",
    "register_router",
    "report",
    "restore",
    "status",
]
