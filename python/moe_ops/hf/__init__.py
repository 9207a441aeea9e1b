"""Integration of Hugging Face transformers.

Importing this module registers ``"moe_ops"`` as an experts implementation, so that::

    import moe_ops.hf

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ops")

and ``model.set_experts_implementation("moe_ops")`` work for every model that uses transformers'
experts interface. :func:`enable` switches a live model instead, including JetMoE, DBRX and Llama 4,
whose blocks do not use that interface and silently ignore the argument.

The module also registers a quantization method, so that ``from_pretrained`` reads checkpoints with
experts quantized by `moe_ops.quantize`; an attention implementation ``"moe_ops"``, which is
torch's attention without the masks that prevent compilation of JetMoE's attention experts; and,
with transformers 5.23 or later, an expert-parallel implementation ``"moe_ops"``.

:func:`load_offloaded` loads models whose experts are larger than the memory. :func:`optimize` runs
a whole model on inference kernels, including dense layers and the head. :func:`export` writes
models for other programs: GGUF, compressed-tensors and GPTQ. :func:`record` and
:func:`replay` carry the experts of each token from a rollout to a trainer.
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
from moe_ops.hf.checkpoints.export import export
from moe_ops.hf.checkpoints.hook import TransformersHook
from moe_ops.hf.checkpoints.offloading import load_offloaded
from moe_ops.hf.checkpoints.placing import load_placed as load_placed
from moe_ops.hf.checkpoints.quantizer import MoeOpsConfig
from moe_ops.hf.decode import attention
from moe_ops.hf.decode.optimize import optimize, restore
from moe_ops.hf.decode.report import report
from moe_ops.hf.experts.forward import experts_forward
from moe_ops.hf.experts.parallel import Interface, register_ep_implementation
from moe_ops.hf.experts.switch import assert_used, disable, enable, status
from moe_ops.hf.hybrid import place as place
from moe_ops.hf.hybrid import unplace as unplace
from moe_ops.hf.models import (
    register_attention,
    register_block,
    register_layer,
    register_network,
    register_norm,
    register_router,
)
from moe_ops.hf.models.attention import PLAIN_FUNCTIONS
from moe_ops.hf.routing.record import record
from moe_ops.hf.routing.replay import replay

ExpertsInterface.register("moe_ops", experts_forward)
PLAIN_FUNCTIONS.add(attention.attention_forward)
attention.register()
published.install()
# It is already registered after a reload.
if Interface is not None and "moe_ops" not in Interface():
    register_ep_implementation("moe_ops")
register_hook(TransformersHook())

__all__ = [
    "MoeOpsConfig",
    "assert_used",
    "disable",
    "enable",
    "export",
    "load_offloaded",
    "optimize",
    "record",
    "register_attention",
    "register_block",
    "register_ep_implementation",
    "register_layer",
    "register_network",
    "register_norm",
    "register_router",
    "replay",
    "report",
    "restore",
    "status",
]
