"""Spindle: plan and run multi-task, multi-modal PyTorch training in waves.

`import spindle` loads neither torch, ray nor a solver; each name below is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spindle.api import TrainResult as TrainResult
    from spindle.api import export as export
    from spindle.api import load_checkpoint as load_checkpoint
    from spindle.api import make_calibration as make_calibration
    from spindle.api import make_metagraph as make_metagraph
    from spindle.api import make_plan as make_plan
    from spindle.api import make_profile as make_profile
    from spindle.api import train as train
    from spindle.api import verify as verify
    from spindle.batch import per_sample as per_sample
    from spindle.calibration import Calibration as Calibration
    from spindle.errors import SpindleError as SpindleError
    from spindle.plan import Plan as Plan
    from spindle.profile import Profile as Profile
    from spindle.workload import Workload as Workload

__version__ = "0.1.0"

_HOME_BY_NAME = {
    "Calibration": "spindle.calibration",
    "Plan": "spindle.plan",
    "Profile": "spindle.profile",
    "SpindleError": "spindle.errors",
    "TrainResult": "spindle.api",
    "Workload": "spindle.workload",
    "export": "spindle.api",
    "load_checkpoint": "spindle.api",
    "make_calibration": "spindle.api",
    "make_metagraph": "spindle.api",
    "make_plan": "spindle.api",
    "make_profile": "spindle.api",
    "per_sample": "spindle.batch",
    "train": "spindle.api",
    "verify": "spindle.api",
}

__all__ = [
    "Calibration",
    "Plan",
    "Profile",
    "SpindleError",
    "TrainResult",
    "Workload",
    "__version__",
    "export",
    "load_checkpoint",
    "make_calibration",
    "make_metagraph",
    "make_plan",
    "make_profile",
    "per_sample",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_BY_NAME.get(name)
    if home is None:
        raise AttributeError(f"module 'spindle' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
