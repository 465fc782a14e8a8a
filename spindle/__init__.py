"""Spindle: plan and run multi-task, multi-modal PyTorch training in waves.

`import spindle` loads neither torch, ray nor a solver; each name below is fetched when it is first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spindle.api import TrainResult as TrainResult
    from spindle.api import make_metagraph as make_metagraph
    from spindle.api import make_plan as make_plan
    from spindle.api import make_profile as make_profile
    from spindle.api import train as train
    from spindle.api import verify as verify
    from spindle.batch import per_sample as per_sample
    from spindle.calibrating import make_calibration as make_calibration
    from spindle.calibration import Calibration as Calibration
    from spindle.checkpoints import export as export
    from spindle.checkpoints import load_checkpoint as load_checkpoint
    from spindle.ema import EMA as EMA
    from spindle.errors import SpindleError as SpindleError
    from spindle.evaluation import EarlyStop as EarlyStop
    from spindle.evaluation import Evaluation as Evaluation
    from spindle.failures import Failures as Failures
    from spindle.plan import Plan as Plan
    from spindle.profile import Profile as Profile
    from spindle.ray_nodes import RayNodes as RayNodes
    from spindle.scoring import evaluate as evaluate
    from spindle.stages import Stage as Stage
    from spindle.stages import train_stages as train_stages
    from spindle.weights import Weights as Weights
    from spindle.workload import Workload as Workload

__version__ = "0.1.0"

for _room in ("planner", "runtime"):
    if os.path.isfile(os.path.join(os.path.dirname(__file__), _room)):
        raise ImportError(
            f"spindle/{_room} of this checkout is a text file where git has a link: run "
            "`git config core.symlinks true` and `git checkout -- spindle/planner spindle/runtime` "
            "(on Windows in developer mode)"
        )

_HOME_BY_NAME = {
    "Calibration": "spindle.calibration",
    "EMA": "spindle.ema",
    "EarlyStop": "spindle.evaluation",
    "Evaluation": "spindle.evaluation",
    "Failures": "spindle.failures",
    "Plan": "spindle.plan",
    "Profile": "spindle.profile",
    "RayNodes": "spindle.ray_nodes",
    "SpindleError": "spindle.errors",
    "Stage": "spindle.stages",
    "TrainResult": "spindle.api",
    "Weights": "spindle.weights",
    "Workload": "spindle.workload",
    "evaluate": "spindle.scoring",
    "export": "spindle.checkpoints",
    "load_checkpoint": "spindle.checkpoints",
    "make_calibration": "spindle.calibrating",
    "make_metagraph": "spindle.api",
    "make_plan": "spindle.api",
    "make_profile": "spindle.api",
    "per_sample": "spindle.batch",
    "train": "spindle.api",
    "train_stages": "spindle.stages",
    "verify": "spindle.api",
}

__all__ = [
    "EMA",
    "Calibration",
    "EarlyStop",
    "Evaluation",
    "Failures",
    "Plan",
    "Profile",
    "RayNodes",
    "SpindleError",
    "Stage",
    "TrainResult",
    "Weights",
    "Workload",
    "__version__",
    "evaluate",
    "export",
    "load_checkpoint",
    "make_calibration",
    "make_metagraph",
    "make_plan",
    "make_profile",
    "per_sample",
    "train",
    "train_stages",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME_BY_NAME.get(name)
    if home is None:
        from spindle.nearest import did_you_mean

        hint = did_you_mean(name, __all__)
        raise AttributeError(f"module 'spindle' has no attribute {name!r}{hint}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
