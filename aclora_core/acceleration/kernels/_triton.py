"""Triton, or a placeholder where it is not installed.

PyTorch brings Triton with its CUDA builds for Linux only. With the placeholder a kernel's file can still be imported
for its limits, reference and examples. Importing this file imports Triton, which takes a moment; kernels/__init__
therefore imports the files of the kernels only when kernels are looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Placeholder:
    """Leaves the source of a kernel as it is; nothing can be launched."""

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return (lambda decorated: decorated) if function is None else function


triton: Any
tl: Any
JITFunction: Any
_missing: ImportError | None = None
try:
    import triton  # type: ignore[import-untyped,import-not-found,no-redef,unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,no-redef,unused-ignore]
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped,import-not-found,no-redef,unused-ignore]
except ImportError as error:
    triton, tl, JITFunction, _missing = _Placeholder, None, type(None), error


def require_triton() -> None:
    """Check that Triton is installed.

    Raises:
        ImportError: Triton, or something that it needs, cannot be imported.
    """
    if _missing is not None:
        raise _missing
