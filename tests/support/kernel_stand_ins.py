"""The kernels' PyTorch references in their place, so that their callers can be tested on the CPU."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any


def reference_kernels(kernels: Any, counted: Counter[str]) -> Any:
    """Make kernels for the CPU that compute their references and count their calls.

    Args:
        kernels: the class Kernels, of the package under test.
        counted: receives one for each call, under the kernel's name followed by the optional parameters in use, such as
            "group_norm silu shift".
    """
    found = kernels("cpu")
    for name, kernel in found.by_name().items():
        setattr(found, name, replace(kernel, operation=_counting(name, kernel.reference, counted)))
    return found


def _counting(name: str, reference: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    signature = inspect.signature(reference)

    def operation(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        used = [parameter.name for parameter in signature.parameters.values() if _is_in_use(parameter, given)]
        counted[" ".join([name, *used])] += 1
        return reference(*args, **kwargs)

    return operation


def _is_in_use(parameter: inspect.Parameter, given: dict[str, Any]) -> bool:
    """Whether a parameter is a flag that is set, or may be None and is not."""
    value = given.get(parameter.name)
    if parameter.annotation == "bool":
        return bool(value)
    return "None" in parameter.annotation and value is not None
