"""Code of transformers' modules, and its digests.

A digest identifies a formula: two classes with one digest compute the same function of their
attributes, whatever their names and the releases that define them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

_MODELS = "transformers.models."
# Parts of a definition that do not change its computation.
_IGNORED = frozenset(("annotation", "returns", "type_comment", "decorator_list", "type_params"))


def is_of_transformers(cls: type) -> bool:
    """Returns True for a class defined in one of transformers' model files."""
    return cls.__module__.startswith(_MODELS)


class Code(NamedTuple):
    """The code that a method runs.

    digest: 12 hexadecimal digits.
    functions: a class or a namespace, a name in it, and the function of that name.
    """

    digest: str
    functions: tuple[tuple[Any, str, Any], ...]

    def is_intact(self) -> bool:
        """Returns False if one of the functions has been replaced."""
        for owner, name, function in self.functions:
            now = owner.get(name) if type(owner) is dict else getattr(owner, name, None)
            if now is not function:
                return False
        return True


def read(cls: type, method: str = "forward") -> Code | None:
    """Returns the code of a method and of all functions that it reaches.

    These are other methods and properties of the class and functions of its file. They are taken
    from the live class, so that a replaced method or helper changes the digest. Annotations,
    docstrings, decorators of transformers and names of functions are ignored.

    Args:
        cls: a class.
        method: the name of the method, which may be inherited.

    Returns:
        The code; None without such a method or without source.
    """
    start = _function(inspect.getattr_static(cls, method, None))
    if start is None:
        return None
    trees: dict[CodeType, str] = {}
    functions = [(cls, method, getattr(cls, method))]
    try:
        _collect(cls, method, start, trees, functions)
    except (OSError, TypeError, SyntaxError):
        return None
    text = "\n".join(sorted(trees.values()))
    return Code(hashlib.sha256(text.encode()).hexdigest()[:12], tuple(functions))


def _collect(
    cls: type,
    name: str,
    function: FunctionType,
    trees: dict[CodeType, str],
    functions: list[tuple[Any, str, Any]],
) -> None:
    for each in _unwrapped(function):
        code = each.__code__
        if code in trees:
            continue
        trees[code] = f"{name}: {_tree(code)}"
        for called in _names(code):
            reached = _function(inspect.getattr_static(cls, called, None))
            owner: Any = cls
            if reached is None or not _is_relevant(reached):
                reached, owner = _function(each.__globals__.get(called)), each.__globals__
            if reached is not None and _is_relevant(reached):
                now = owner[called] if owner is not cls else getattr(cls, called)
                functions.append((owner, called, now))
                _collect(cls, called, reached, trees, functions)


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, nn.Module) and _is_decorator(type(value).forward):
        # Its decorator makes a module of a function.
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _is_relevant(function: Callable[..., Any]) -> bool:
    """Returns False for functions of torch and for those that all models of transformers share."""
    module = function.__module__ or ""
    return module.startswith(_MODELS) or module.split(".")[0] not in ("torch", "transformers")


def _is_decorator(function: Any) -> bool:
    """Returns True for code of transformers outside its models, and for code of kernels, with which
    it lets other packages replace a function or a forward."""
    package, _, rest = getattr(function, "__globals__", {}).get("__name__", "").partition(".")
    return package == "kernels" or (package == "transformers" and not rest.startswith("models."))


def _unwrapped(function: FunctionType) -> Iterator[FunctionType]:
    """Yields a function and the functions that it wraps, without the wrappers of decorators."""
    each: Any = function
    while isinstance(each, FunctionType):
        inner = getattr(each, "__wrapped__", None)
        if inner is None or not _is_decorator(each):
            yield each
        each = inner


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _tree(code: CodeType) -> str:
    source = textwrap.dedent("".join(inspect.getsourcelines(code)[0]))
    # transformers renamed this argument in release 5.21.
    return _dump(ast.parse(source).body[0]).replace("past_key_values", "cache")


def _dump(node: Any) -> str:
    """Returns a text that depends only on the code, not on the version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {k: v for k, v in ast.iter_fields(node) if k not in _IGNORED and v not in (None, [])}
    if isinstance(node, ast.FunctionDef):
        fields["body"] = [n for n in node.body if not _is_docstring(n)]
        fields.pop("name")
    for name in ("ctx", "kind"):
        fields.pop(name, None)
    return f"{type(node).__name__}({','.join(f'{k}={_dump(v)}' for k, v in fields.items())})"


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def path_of(cls: type) -> str:
    """Returns the short name of a class in messages: its file and its own name."""
    return f"{cls.__module__.rpartition('.')[2].removeprefix('modeling_')}.{cls.__qualname__}"


def has_own_forward(module: nn.Module) -> bool:
    """Returns True if a forward was set on this module, as accelerate and kernels do."""
    return "forward" in module.__dict__
