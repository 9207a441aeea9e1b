"""Progress bars of the zoo's loops."""

from __future__ import annotations

from typing import Any


def bar(total: int, what: str, progress: bool) -> Any:
    """A tqdm bar, or with `progress` False one that shows nothing.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not progress:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ImportError(
            "bench.studies: progress=True needs tqdm, which is not installed: "
            "pip install torch-moe-ops[studies]"
        ) from error
    return tqdm(total=total, desc=what, leave=False)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        return None

    def set_postfix(self, *_: object, **__: object) -> None:
        return None
