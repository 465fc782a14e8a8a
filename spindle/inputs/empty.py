"""Empty modules: a function that builds modules in; the same modules with parameters that take no memory out.

Parameters go to the meta device as they are registered, before anything is written to them. Buffers, and all else that
`__init__` computes, are real: so what no file of weights holds (rotary frequencies, positions) is right.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


def built_empty(build: Callable[[], T]) -> T:
    """What `build()` gives, its parameters on the meta device."""
    own = threading.get_ident()
    metas: Any = WeakIdKeyDictionary()  # one that is registered under two names stays one

    def emptied(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != own:
            return None
        if parameter not in metas:
            empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
            metas[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        found: nn.Parameter = metas[parameter]
        return found

    hook = register_module_parameter_registration_hook(cast(Any, emptied))
    try:
        return build()
    finally:
        hook.remove()
