"""One file of the package holds every private name of torch that it uses; here is their list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "moe_ops"
HOME = PACKAGE / "_private_torch.py"

# Without these there are no rules of autograd, no expert parallelism, no trace of a plan, or no
# answer of a diagnosis.
NEEDED = {
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._after_autograd_keyset",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C._jit_get_all_schemas",
    "torch._check",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.distributed._functional_collectives",
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
    "torch.ops._c10d_functional",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.utils._python_dispatch.TorchDispatchMode",
}
# What takes the place of these is tested below.
REPLACEABLE = {
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._any_requires_grad",
    "torch._C._are_functorch_transforms_active",
    "torch._C._cuda_getDriverVersion",
    "torch._C._current_graph_task_id",
    "torch._C._disabled_torch_function_impl",
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "torch._C._dispatch_tls_is_dispatch_key_included",
    "torch._C._is_any_autocast_enabled",
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._functorch.utils.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd.function._SingleLevelFunction",
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils.checkpoint._CachedTorchDispatchMode",
}
# Of the objects that torch.ops holds.
ATTRIBUTES = {"_handle", "_op", "_schema"}


def dotted_names(path: Path) -> set[str]:
    """Everything below torch that a file imports or reads, also by getattr with a constant."""
    tree = ast.parse(path.read_text())
    meaning = {}  # Of a name of the file: what it is in torch.
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    meaning[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                meaning[alias.asname or alias.name] = name
                found.add(name)

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return meaning.get(node.id)
        if isinstance(node, ast.Attribute):
            before, name = dotted(node.value), node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            before, name = dotted(node.args[0]), str(node.args[1].value)
        else:
            return None
        return None if before is None else f"{before}.{name}"

    return found | {name for node in ast.walk(tree) if (name := dotted(node)) is not None}


def private_names(path: Path) -> set[str]:
    """The longest names with a part that begins with one underscore."""

    def is_private(part: str) -> bool:
        return part.startswith("_") and not part.startswith("__")

    names = {n for n in dotted_names(path) if any(map(is_private, n.split(".")))}
    return {n for n in names if not any(other.startswith(f"{n}.") for other in names)}


def test_the_list_is_complete():
    found = private_names(HOME)
    keys = {n for n in found if n.startswith("torch._C.DispatchKey.")}
    found = (found - keys - {"torch.utils._python_dispatch"}) | {"torch._C.DispatchKey"}
    assert found == NEEDED | REPLACEABLE


def test_no_other_file_has_one():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == HOME:
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        reads = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        found[path.relative_to(PACKAGE).as_posix()] = private_names(path) | reads & ATTRIBUTES
    assert {path: names for path, names in found.items() if names} == {}


LACKING = """
import importlib.util, sys, types
import torch

class Lacking(types.ModuleType):
    def __init__(self, module, names):
        super().__init__(module.__name__)
        self.__dict__.update(module=module, names=names)
    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(name)
        return getattr(self.module, name)

real, missing = {}, {}
for name in sys.argv[2].split(","):
    module, _, attribute = name.rpartition(".")
    missing.setdefault(module, set()).add(attribute)
import torch._functorch.utils, torch.autograd.forward_ad, torch.utils._python_dispatch
for name, attributes in missing.items():
    parent, _, last = name.rpartition(".")
    real[name] = sys.modules[name]
    sys.modules[name] = Lacking(real[name], attributes)
    setattr(sys.modules[parent], last, sys.modules[name])
spec = importlib.util.spec_from_file_location("moe_ops._private_torch", sys.argv[1])
private = importlib.util.module_from_spec(spec)
spec.loader.exec_module(private)
below_autocast = private.without_autocast("cpu")
private.without_autocast = lambda device: below_autocast
for name, module in real.items():
    parent, _, last = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[parent], last, module)
sys.modules["moe_ops._private_torch"] = private

import moe_ops
from moe_ops import packing, reference
from moe_ops.ops import _autograd

assert not private.is_plain_eager()
ids = torch.randint(3, (6, 2))
shapes = (6, 8), (3, 8, 8), (3, 8, 4), (6, 2)
args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
for name in ("moe_ffn", "moe_linear_map"):
    given = (*args, ids) if name == "moe_ffn" else (*args[:2], ids)
    op, expected = getattr(moe_ops, name), getattr(reference, name)
    got, want = (f(*given) for f in (op, expected))
    assert got.requires_grad
    torch.testing.assert_close(got, want)
    leaves = given[:-1]
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(op(*given), want)
    with torch.inference_mode():
        torch.testing.assert_close(op(*given), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*(t.float() for t in leaves), ids).dtype == torch.bfloat16
print("done")
"""


def test_a_torch_without_what_can_be_replaced():
    """Results are the same; calls pass through the dispatcher."""
    run = subprocess.run(
        [sys.executable, "-c", LACKING, str(HOME), ",".join(sorted(REPLACEABLE))],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "done\n", run.stderr
