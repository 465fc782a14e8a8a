"""Sources: what a command line names (a spec, a MetaGraph, or a Python file and a name in it), loaded.

Only a Python source imports torch, because the user's file does.
"""

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spindle.errors import FormatError, SpindleError, WorkloadError
from spindle.graph import base_task
from spindle.metagraph import MetaGraph
from spindle.plan import SizeRange
from spindle.presence import Presence
from spindle.pricing import Optimizer, Pricing

if TYPE_CHECKING:
    from spindle.workload import Workload


OPTIMIZERS: Mapping[str, Optimizer] = {
    "Adam": "adam",
    "Adam8bit": "adamw_8bit",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "adamw_8bit",
    "Adafactor": "adafactor",
    "Lion": "lion",
    "Muon": "muon",
    "Shampoo": "shampoo",
    "DistributedShampoo": "shampoo",
}
"""What classes of optimizers are, as far as their states go; SGD depends on its momentum, others count as AdamW."""


@dataclass(frozen=True)
class Source:
    """A source's MetaGraph (with operators unless it came from a MetaGraph file), and how a spec says it is trained.

    `executable`: this Spindle can run it, so a plan may only use what the runtime does. `steps`: the same MetaGraph on
    other batches, where these differ, and `sizes` of the batches that were read. `is_mean`: `metagraph` stands for
    their mean already, as that of a spec does. `presences`: how often each task takes part in a step.
    """

    metagraph: MetaGraph
    pricing: Pricing
    executable: bool = False
    steps: tuple[MetaGraph, ...] = ()
    sizes: tuple[SizeRange, ...] = ()
    is_mean: bool = False
    presences: tuple[Presence, ...] = ()


def load_source(source: str, on_task: Callable[[str], object] = str, *, tasks: str | None = None) -> Source:
    """Load any source; `on_task` is told which task of a model is being traced. `tasks`: only these, as `chosen_tasks`
    reads them.

    Raises FormatError when `source` is none of the three kinds or cannot be read, WorkloadError for a broken file.py.
    """
    if source.endswith((".yaml", ".yml")):
        from spindle.contract import contract, contract_like
        from spindle.spec.file import read_workload
        from spindle.spec.graph import build_graph

        spec = read_workload(source)
        spec = spec.only(chosen_tasks(tasks, [task.name for task in spec.tasks]))
        metagraph = contract(build_graph(spec))
        steps = tuple(contract_like(metagraph, build_graph(step)) for step in spec.steps())
        return Source(metagraph, spec.pricing, steps=steps, is_mean=True, presences=spec.presences)
    if source.endswith(".json"):
        from spindle.formats import read

        return Source(_with_tasks(read(source, MetaGraph), tasks), Pricing())
    workload, module = load_workload(source)
    if tasks is not None:
        workload = workload.only(chosen_tasks(tasks, workload.tasks))
    return source_of(workload, getattr(module, "optimizer", None), on_task)


def chosen_tasks(text: str | None, names: Collection[str]) -> list[str]:
    """The first k of `names` for a number k, those of a list with commas, or all of them; FormatError for others.

    >>> chosen_tasks("2", ["a", "b", "c"]), chosen_tasks("c,a", ["a", "b", "c"])
    (['a', 'b'], ['a', 'c'])
    """
    if text is None:
        return list(names)
    if text.isdecimal() and text not in names:
        if not 1 <= int(text) <= len(names):
            raise FormatError(f"--tasks is {text}, and there are {len(names)} tasks; give a number from 1 to that")
        return list(names)[: int(text)]
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise FormatError(f"--tasks names {unknown[0]!r}, which is no task; the tasks are {', '.join(names)}")
    return [name for name in names if name in wanted]


def _with_tasks(metagraph: MetaGraph, text: str | None) -> MetaGraph:
    """The MetaOps of some tasks, and the flows between them; a flow from another task is cut."""
    tasks = dict.fromkeys(base_task(metaop.task) for metaop in metagraph)
    wanted = set(chosen_tasks(text, tasks))
    kept = {metaop.name for metaop in metagraph if base_task(metaop.task) in wanted}
    return replace(
        metagraph,
        metaops=tuple(metaop for metaop in metagraph if metaop.name in kept),
        flows=tuple(flow for flow in metagraph.flows if {flow.source, flow.target} <= kept),
    )


def source_of(
    workload: "Workload",
    optimizer: "Callable[[Any], Any] | None" = None,
    on_task: Callable[[str], object] = str,
) -> Source:
    """A workload captured, on some dozens of its batches. Raises WorkloadError naming the task and the reason."""
    from spindle.capture import capture
    from spindle.capture.sizes import sizes_of
    from spindle.contract import contract, contract_like

    captured = capture(workload, on_task)
    metagraph = contract(captured.graph)
    found = sizes_of(workload, captured, on_task)
    steps = tuple(contract_like(metagraph, graph) for graph in found.steps)
    presences = tuple(
        Presence(task=task.name, probability=task.probability, every=task.every) for task in workload.tasks.values()
    )
    pricing = pricing_of(workload, optimizer)
    return Source(metagraph, pricing, executable=True, steps=steps, sizes=found.ranges, presences=presences)


def pricing_of(workload: "Workload", optimizer: "Callable[[Any], Any] | None" = None) -> Pricing:
    """How a workload says that it is trained; `optimizer` makes its optimiser. An unknown one counts as AdamW."""
    kind: Optimizer = "adamw"
    if optimizer is not None:
        import torch

        with _users_errors("optimizer"):
            made = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])  # a matrix: some take nothing else
        sgd: Optimizer = "sgd_momentum" if made.defaults.get("momentum") else "sgd"
        kind = {**OPTIMIZERS, "SGD": sgd}.get(type(made).__name__, kind)
    return Pricing(
        optimizer=kind,
        shard_optimizer=workload.shard_optimizer,
        recomputed=tuple(sorted(workload.recompute)),
    )


def is_python(source: str) -> bool:
    """Whether a source names a workload in a Python file."""
    return source.rpartition(":")[0].endswith(".py") or source.endswith(".py")


def python_file(source: str) -> str:
    """The file of a source that names a workload in a Python file. Raises FormatError when it does not."""
    if not is_python(source):
        raise FormatError(
            f"source {source!r} is not a workload; give file.py:workload, a spec (.yaml) or a MetaGraph (.json)"
        )
    return source if source.endswith(".py") else source.rpartition(":")[0]


def check_syntax(path: Path) -> None:
    """Read a Python file without running it. Raises FormatError when there is none, WorkloadError for broken syntax."""
    _check_file(path)
    with _users_errors(str(path)):
        compile(path.read_bytes(), os.path.abspath(path), "exec")


def load_workload(source: str) -> "tuple[Workload, ModuleType]":
    """The Workload that `file.py:name` names (`workload` when no name is given), and the file's module.

    The name may stand for a Workload or for a function without arguments that returns one.
    """
    path = python_file(source)
    name = source.removeprefix(path).lstrip(":") or "workload"
    module = _import(Path(path))
    from spindle.workload import Workload

    value: Any = getattr(module, name, None)
    if value is None:
        known = [key for key, member in vars(module).items() if isinstance(member, Workload)]
        raise WorkloadError(f"{path} has no {name!r}; it defines the workloads {', '.join(known) or '(none)'}")
    workload = value
    if callable(value) and not isinstance(value, Workload):
        with _users_errors(path):
            workload = value()
    if not isinstance(workload, Workload):
        raise WorkloadError(f"{source} is a {type(workload).__name__}; let it be a spindle.Workload or return one")
    return workload, module


def _check_file(path: Path) -> None:
    if not path.is_file():
        reason = "a folder" if path.is_dir() else "no such file"
        raise FormatError(f"{path}: cannot be read ({reason}); check the path")


def _import(path: Path) -> ModuleType:
    _check_file(path)
    name = f"spindle_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does
    with _users_errors(str(path)):
        spec.loader.exec_module(module)
    _travel_by_value(module)
    return module


@contextlib.contextmanager
def _users_errors(path: str) -> Iterator[None]:
    """What the user's file raises becomes one line that says where in it."""
    try:
        yield
    except SpindleError:
        raise
    except (Exception, SystemExit) as error:
        whole = os.path.abspath(path)  # as modules know their files
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == whole]
        if isinstance(error, SyntaxError) and error.filename == whole:
            lines.append(error.lineno)
        where = f", line {lines[-1]}" if lines else ""
        reason = " ".join(str(error).split()) or "no message"
        raise WorkloadError(f"{path}{where} raised {type(error).__name__}: {reason}; mend the file") from error


def _travel_by_value(module: ModuleType) -> None:
    """Workers cannot import the user's file by our name for it, so what it defines is sent whole."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)
