"""Spindle: plan and run multi-task, multi-modal PyTorch training in waves.

`import spindle` loads neither torch, ray nor a solver; each name below is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spindle.errors import SpindleError as SpindleError

__version__ = "0.1.0"

_HOME_BY_NAME = {
    "SpindleError": "spindle.errors",
}

__all__ = ["SpindleError", "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME_BY_NAME.get(name)
    if home is None:
        raise AttributeError(f"module 'spindle' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
