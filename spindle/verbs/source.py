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
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spindle.errors import FormatError, SpindleError, WorkloadError
from spindle.inputs.usercode import takes_names
from spindle.values.cost_options import CostOptions, Optimizer
from spindle.values.execution import Execution
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import SizeRange
from spindle.values.presence import Presence
from spindle.words.harmless import harmless
from spindle.words.nearest import did_you_mean

if TYPE_CHECKING:
    from spindle.spec.values import WorkloadSpec
    from spindle.values.calibration import Calibration, MeasuredStep
    from spindle.values.cluster import Cluster
    from spindle.values.profile import Profile
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
    their mean already, as that of a spec does. `spec`: what it was made of, where that was a spec. `presences`: how
    often each task takes part in a step. `name`: of the workload, "" for a MetaGraph.
    """

    metagraph: MetaGraph
    cost_options: CostOptions
    executable: bool = False
    steps: tuple[MetaGraph, ...] = ()
    sizes: tuple[SizeRange, ...] = ()
    is_mean: bool = False
    spec: "WorkloadSpec | None" = None
    presences: tuple[Presence, ...] = ()
    name: str = ""


def load_source(
    source: str,
    on_task: Callable[[str], object] = str,
    *,
    tasks: str | None = None,
    per_device: tuple[int, int] | None = None,
) -> Source:
    """Load any source; `on_task` is called with the task of a model that is being traced. `tasks`: only these, as
    `chosen_tasks` reads them. `per_device`: a batch, and the number of devices that each have that batch a
    step, to scale a spec's batches to.

    Raises FormatError when `source` is none of the three kinds or cannot be read, WorkloadError for a broken file.py.
    """
    if source.endswith((".yaml", ".yml")):
        from spindle.spec.batch import per_device as scaled
        from spindle.spec.file import read_workload

        spec = read_workload(source)
        spec = spec.only(chosen_tasks(tasks, [task.name for task in spec.tasks]))
        return spec_source(spec if per_device is None else scaled(spec, *per_device))
    if per_device is not None:
        raise FormatError(
            f"{source}: its batches cannot be scaled to {per_device[0]} samples a device, only those of a spec (.yaml) "
            "can; set the batch sizes where they are given"
        )
    if source.endswith(".json"):
        from spindle.files.formats import read

        return Source(_with_tasks(read(source, MetaGraph), tasks), CostOptions())
    workload, module = load_workload(source)
    if tasks is not None:
        workload = workload.only(chosen_tasks(tasks, workload.tasks))
    return source_of(workload, getattr(module, "optimizer", None), on_task)


def spec_source(spec: "WorkloadSpec") -> Source:
    """A spec's MetaGraph, and the same on batches whose lengths were drawn."""
    from spindle.spec.graph import build_graph
    from spindle.values.contract import contract, contract_like

    metagraph = contract(build_graph(spec))
    steps = tuple(contract_like(metagraph, build_graph(step)) for step in spec.steps())
    return Source(
        metagraph, spec.cost_options, steps=steps, is_mean=True, spec=spec, presences=spec.presences, name=spec.name
    )


def costs_on(
    source: Source,
    cluster: "Cluster",
    profile: "Profile | None" = None,
    calibration: "Calibration | None" = None,
    *,
    is_as_run: bool = False,
) -> "tuple[Cluster, CostOptions]":
    """The cluster with links as the profile measured them and factors as the calibration fitted them, and how the
    workload is trained. `is_as_run`: the cluster's device has the constants of layers as they are run already.

    Raises ProfileError where the profile is of another device.
    """
    from spindle.cost.measured.links import check_device, measured_links, warn_of_gaps
    from spindle.cost.style import style_of
    from spindle.values.calibration import calibrated
    from spindle.values.execution import as_run

    cost_options = source.cost_options
    if profile is not None:
        check_device(cluster, profile)
        warn_of_gaps(source.metagraph, profile)
        cluster = measured_links(cluster, profile)
        cost_options = replace(cost_options, execution=style_of(source.metagraph, cluster, profile, cost_options))
    cluster = cluster if is_as_run else as_run(cluster, cost_options.execution)
    return cluster if calibration is None else calibrated(cluster, calibration), cost_options


def costed_source(
    source: Source, cluster: "Cluster", profile: "Profile | None" = None, calibration: "Calibration | None" = None
) -> MetaGraph:
    """The MetaGraph with the times that a plan on `cluster` starts from, before memory makes it choose otherwise."""
    from spindle.cost.sampled import cost_steps

    where, cost_options = costs_on(source, cluster, profile, calibration)
    found = cost_steps(source.metagraph, source.steps, where, profile, cost_options, is_mean=source.is_mean)
    return found.metagraph


def scaled_source(source: Source, factor: Fraction) -> Source | None:
    """The same with all batches times a factor; None where a batch would be no whole number, or only times are known.

    What was captured is scaled operator by operator: what stands in no proportion to the batch is found by it too.
    """
    if source.spec is not None:
        from spindle.spec.batch import scaled_by

        spec = scaled_by(source.spec, factor)
        return None if spec is None else spec_source(spec)
    from spindle.cost.scaled import scaled

    graphs = [scaled(graph, factor) for graph in (source.metagraph, *source.steps)]
    if any(graph is None for graph in graphs):
        return None
    first, *steps = (graph for graph in graphs if graph is not None)
    return replace(source, metagraph=first, steps=tuple(steps))


def on_batches(source: str) -> "Callable[[MeasuredStep, Cluster], Source]":
    """What ran in a measured step: a spec or a model, with its batches scaled to those of the row.

    Raises FormatError where they cannot be scaled so, WorkloadError where a task of a spec would have no whole batch.
    """
    loaded = load_source(source)
    if loaded.spec is not None:
        return lambda row, _: load_source(source, per_device=(row.per_gpu_batch, row.gpus))
    if not all(metaop.operators for metaop in loaded.metagraph):
        raise FormatError(
            f"{source}: a MetaGraph tells times and no batch, so measured steps cannot be set beside it; calibrate on "
            "the spec or the model that it came from"
        )
    total = sum({op.task: op.batch_size for metaop in loaded.metagraph for op in metaop.operators}.values())

    def scaled(row: "MeasuredStep", where: "Cluster") -> Source:
        samples = row.gpus * row.per_gpu_batch
        found = scaled_source(loaded, Fraction(samples, total))
        if found is None:
            raise FormatError(
                f"{source}: {row} are {samples} samples a step, and its batches of {total} in all do not scale to "
                "that (whole batches, of samples that are alike); measure steps of other batches, or write a spec"
            )
        return found

    return scaled


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
        raise FormatError(
            f"--tasks names {unknown[0]!r}, which is no task{did_you_mean(unknown[0], names)}; "
            f"the tasks are {', '.join(names)}"
        )
    return [name for name in names if name in wanted]


def _with_tasks(metagraph: MetaGraph, text: str | None) -> MetaGraph:
    """The MetaOps of some tasks, and the flows between them; a flow from another task is cut."""
    tasks = dict.fromkeys(base_task(metaop.task) for metaop in metagraph)
    wanted = set(chosen_tasks(text, tasks))
    return metagraph.only({metaop.name for metaop in metagraph if base_task(metaop.task) in wanted})


def source_of(
    workload: "Workload",
    optimizer: "Callable[[Any], Any] | None" = None,
    on_task: Callable[[str], object] = str,
) -> Source:
    """A workload captured, on some dozens of its batches. Raises WorkloadError naming the task and the reason."""
    from spindle.capture import capture
    from spindle.capture.sizes import sizes_of
    from spindle.values.contract import contract, contract_like

    captured = capture(workload, on_task)
    metagraph = contract(captured.graph)
    found = sizes_of(workload, captured, on_task)
    steps = tuple(contract_like(metagraph, graph) for graph in found.steps)
    presences = tuple(
        Presence(task=task.name, probability=task.probability, every=task.every, mixture=task.mixture)
        for task in workload.tasks.values()
    )
    written = {name.partition(".")[0] for w in captured.graph.writes for name in (w.target, *w.sources)}
    cost_options = cost_options_of(workload, optimizer)
    whole = written | {name.partition(".")[0] for name in workload.changed_whole()}
    cost_options = replace(cost_options, never_sharded=tuple(sorted({*cost_options.never_sharded, *whole})))
    return Source(
        metagraph,
        cost_options,
        executable=True,
        steps=steps,
        sizes=found.ranges,
        presences=presences,
        name=harmless(workload.name),
    )


def cost_options_of(workload: "Workload", optimizer: "Callable[[Any], Any] | None" = None) -> CostOptions:
    """How a workload says that it is trained; `optimizer` makes its optimizer. An unknown one counts as AdamW."""
    import torch

    kind: Optimizer = "adamw"
    fused = False
    if optimizer is not None:
        with _users_errors("optimizer"):
            made = _tried(optimizer, workload)
        sgd: Optimizer = "sgd_momentum" if made.defaults.get("momentum") else "sgd"
        fused = bool(made.defaults.get("fused"))
        kind = {**OPTIMIZERS, "SGD": sgd}.get(type(made).__name__, kind)
    return CostOptions(
        optimizer=kind,
        shard_optimizer=workload.shard_optimizer,
        shard_parameters=workload.shard_parameters,
        never_sharded=tuple(sorted(c.name for c in workload.components.values() if c.shard == "nothing")),
        recomputed=tuple(sorted(workload.recompute)),
        master_weights=workload.master_weights == "fp32",
        wide_gradients=True,
        averages=workload.ema is not None,
        execution=Execution(
            gradients="float32" if _reduces_wide(workload) else "parameters",
            layers="eager",
            optimizer="fused" if fused else "plain",
            tf32=torch.get_float32_matmul_precision() != "highest",
        ),
    )


def _tried(optimizer: "Callable[[Any], Any]", workload: "Workload") -> Any:
    """What a function that makes an optimizer makes of parameters like the workload's, which take no memory."""
    import torch

    alike = {
        name: torch.nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad)
        for name, p in workload.named_parameters()
    }
    alike = alike or {"none": torch.nn.Parameter(torch.zeros(1, 1))}  # optimizers refuse an empty list
    return optimizer(list(alike.items()) if takes_names(optimizer) else list(alike.values()))


def _reduces_wide(workload: "Workload") -> bool:
    """Whether ranks add up gradients of sixteen-bit parameters in float32."""
    masters = workload.master_weights == "fp32"
    return workload.reduce_dtype == "fp32" or (workload.reduce_dtype is None and masters)


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
        hint = did_you_mean(name, known)
        raise WorkloadError(f"{path} has no {name!r}{hint}; it defines the workloads {', '.join(known) or '(none)'}")
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
