"""Spindle: plan and run multi-task, multi-modal PyTorch training in waves.

`import spindle` loads neither torch, ray nor a solver; each name below is fetched when it is first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spindle.errors import SpindleError as SpindleError
    from spindle.evaluation import EarlyStop as EarlyStop
    from spindle.evaluation import Evaluation as Evaluation
    from spindle.failures import Failures as Failures
    from spindle.inputs.batch import per_sample as per_sample
    from spindle.inputs.ema import EMA as EMA
    from spindle.inputs.weights import Weights as Weights
    from spindle.ray_nodes import RayNodes as RayNodes
    from spindle.values.calibration import Calibration as Calibration
    from spindle.values.plan import Plan as Plan
    from spindle.values.profile import Profile as Profile
    from spindle.verbs.calibrating import make_calibration as make_calibration
    from spindle.verbs.checkpoints import export as export
    from spindle.verbs.checkpoints import load_checkpoint as load_checkpoint
    from spindle.verbs.measuring import make_profile as make_profile
    from spindle.verbs.planning import make_metagraph as make_metagraph
    from spindle.verbs.planning import make_plan as make_plan
    from spindle.verbs.scoring import evaluate as evaluate
    from spindle.verbs.stages import Stage as Stage
    from spindle.verbs.stages import train_stages as train_stages
    from spindle.verbs.training import TrainResult as TrainResult
    from spindle.verbs.training import train as train
    from spindle.verbs.verifying import verify as verify
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
    "Calibration": "spindle.values.calibration",
    "EMA": "spindle.inputs.ema",
    "EarlyStop": "spindle.evaluation",
    "Evaluation": "spindle.evaluation",
    "Failures": "spindle.failures",
    "Plan": "spindle.values.plan",
    "Profile": "spindle.values.profile",
    "RayNodes": "spindle.ray_nodes",
    "SpindleError": "spindle.errors",
    "Stage": "spindle.verbs.stages",
    "TrainResult": "spindle.verbs.training",
    "Weights": "spindle.inputs.weights",
    "Workload": "spindle.workload",
    "evaluate": "spindle.verbs.scoring",
    "export": "spindle.verbs.checkpoints",
    "load_checkpoint": "spindle.verbs.checkpoints",
    "make_calibration": "spindle.verbs.calibrating",
    "make_metagraph": "spindle.verbs.planning",
    "make_plan": "spindle.verbs.planning",
    "make_profile": "spindle.verbs.measuring",
    "per_sample": "spindle.inputs.batch",
    "train": "spindle.verbs.training",
    "train_stages": "spindle.verbs.stages",
    "verify": "spindle.verbs.verifying",
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
        from spindle.words.nearest import did_you_mean

        hint = did_you_mean(name, __all__)
        raise AttributeError(f"module 'spindle' has no attribute {name!r}{hint}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
