"""Workload: a user's modules and task functions, as they are; nothing runs here.

workload = spindle.Workload("clip")
vision = workload.component("vision", vision_model)

@workload.task("image-text", batch_size=64, data=loader)
def image_text(batch): ...
"""

import copy
import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from spindle.errors import WorkloadError
from spindle.inputs.after_step import AfterStep
from spindle.inputs.after_step import Function as AfterStepFunction
from spindle.inputs.batch import SampledBatch, sampled
from spindle.inputs.compilation import Compilation, Compile
from spindle.inputs.ema import EMA
from spindle.inputs.empty import built_empty
from spindle.inputs.loaders import check_apart, reading, set_epoch
from spindle.inputs.nested import nested
from spindle.inputs.ray_data import batches_of
from spindle.inputs.weighing import Weigh, check_weigh, counted
from spindle.inputs.weights import Weights
from spindle.mixtures import Mixture
from spindle.words.nearest import did_you_mean
from spindle.words.whole_numbers import is_whole

Batch = dict[str, Any]
Precision = Literal["fp32", "bf16"]
ReduceType = Literal["fp32", "bf16"]
MasterWeights = Literal["fp32", "none"]
OnEnd = Literal["restart", "stop", "error"]
Sharded = Literal["nothing", "parameters"]
TaskFunction = Callable[[Batch], Tensor]
RowsFunction = Callable[[Batch], Mapping[str, Any]]
FunctionT = TypeVar("FunctionT", bound=TaskFunction)
AfterFunctionT = TypeVar("AfterFunctionT", bound=AfterStepFunction)
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: its function from a batch to a scalar loss, its data, and its weight in the sum of losses.

    It takes part in every `every`-th step, the first included, in each step with `probability`, or in steps that its
    `mixture` draws it for. When its data ends, `on_end` says what follows. `prefetch` batches are read ahead. `rows`
    counts the rows of packed fields by sample; `weigh` says by what the losses of a step's batches are weighted.
    `evaluates`: its function gives outputs of an evaluation, packed.
    """

    name: str
    function: TaskFunction
    batch_size: int
    data: Iterable[Any] | Callable[[], Iterable[Any]]
    weight: float = 1.0
    every: int = 1
    probability: float = 1.0
    on_end: OnEnd = "restart"
    prefetch: int = 1
    rows: RowsFunction | None = None
    weigh: Weigh = "micro-batches"
    evaluates: bool = False
    mixture: Mixture | None = None

    def takes_part(self, step: int, seed: int) -> bool:
        """Whether the task takes part in a step: the same answer in every process."""
        if self.mixture is not None:
            return self.name in self.mixture.drawn(step, seed)
        if step % self.every:
            return False
        return self.probability >= 1 or random.Random(f"{seed}/{step}/{self.name}").random() < self.probability

    def batches(self) -> Iterator[Any]:
        """The first pass over the task's data, which stays as it is. Raises WorkloadError when there is none."""
        own = reading(self.data)
        batches = self.begun(own.data, 0)
        return own.kept(batches) if own.outside or own.loaders else batches

    def begun(self, data: Any, epoch: int, state: Any = None) -> Iterator[Any]:
        """Pass `epoch` over the task's data, which its reader has from `spindle.inputs.loaders.reading`. `state`: where
        in it a loader that keeps one goes on. Raises WorkloadError when there is no pass to be had.
        """
        where = f"task {self.name!r}"
        source = batches_of(where, data(), self.batch_size) if callable(data) else data
        set_epoch(where, source, epoch)
        if state is not None:
            source.load_state_dict(state)
        try:
            iterator: Iterator[Any] = iter(source)
        except TypeError:
            raise WorkloadError(
                f"{where}: data is a {type(source).__name__}; give an iterable of batches or a function that returns "
                "one"
            ) from None
        if iterator is source and not callable(data):
            raise WorkloadError(
                f"{where}: data is a one-time iterator ({type(source).__name__}); give a list, a loader, or "
                "a function that returns a fresh iterator"
            )
        return iterator

    def __reduce__(self) -> Any:
        """A task travels with a loader that nobody has begun to read, so without its worker processes."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return _task, ({**values, "data": reading(self.data).data},)

    def sampled(self, batch: Any) -> SampledBatch:
        """The batch with its samples. Raises WorkloadError when it is no dict, its fields do not hold the same samples,
        or `rows` does not fit them.
        """
        where = f"task {self.name!r}"
        if not isinstance(batch, Mapping) or not batch:
            raise WorkloadError(f"{where}: a batch is a {type(batch).__name__}; the loader must give dicts of fields")
        rows: Mapping[str, Any] = {}
        if self.rows is not None:
            try:
                rows = dict(self.rows(nested(batch)))
            except WorkloadError as error:
                raise WorkloadError(f"{where}: rows= raised: {error}") from error
            except Exception as error:
                raise WorkloadError(f"{where}: rows= raised {type(error).__name__}: {error}; correct rows=") from error
        return sampled(where, batch, rows, self.batch_size)

    def counted(self, batch: SampledBatch) -> float:
        """What a batch counts among those of its step. Raises WorkloadError where `weigh` gives no number for it."""
        return counted(f"task {self.name!r}", self.weigh, batch)

    def first_batch(self) -> Batch:
        """The first batch of a fresh pass, checked. Raises WorkloadError when the loader raises, too."""
        try:
            first = list(itertools.islice(self.batches(), 1))
        except WorkloadError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or "no message"
            raise WorkloadError(
                f"task {self.name!r}: its loader raised {type(error).__name__}: {reason}; mend the loader"
            ) from error
        if not first:
            raise WorkloadError(f"task {self.name!r}: its data holds no batch; give at least one")
        return nested(self.sampled(first[0]).fields)


def _task(values: Mapping[str, Any]) -> Task:
    return Task(**values)


@dataclass(frozen=True, slots=True)
class Component:
    """A named part of the model; `layers` names its lists of blocks and single blocks when no rule finds them.

    `optimizer` holds what its parameters get in place of the optimizer's defaults: learning rate, weight decay.
    `weights`: files that hold what its parameters are on the meta device for.
    `tensor_parallel` is the most devices that one copy of a block may be spread over, `tensor_plan` tells how. `shard`
    tells what each device keeps a part of, `compilation` how its layers are compiled.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...] | None = None
    optimizer: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tensor_parallel: int = 1
    tensor_plan: Mapping[str, str] | None = None
    weights: Weights | None = None
    shard: Sharded | None = None
    compilation: Compilation | None = None


class Workload:
    """A model of several components, trained on several tasks at once."""

    def __init__(
        self,
        name: str,
        *,
        accumulate: int = 1,
        in_flight: int = 1,
        precision: Precision = "fp32",
        max_grad_norm: float | None = None,
        recompute: Iterable[str] = (),
        shard_optimizer: bool = False,
        master_weights: MasterWeights = "fp32",
        reduce_dtype: ReduceType | None = None,
        ema: EMA | float | None = None,
    ) -> None:
        """An empty workload; add components, then tasks.

        `accumulate`: gradient accumulation, batches of each task in a step; the loss is their mean, weighted as `weigh`
        of the task says. `in_flight`: how many of them are planned side by side, which fills gaps and takes memory; the
        others follow in rounds. `precision`: "bf16" computes under `torch.autocast`; parameters, gradients and
        optimizer states keep their own types. `max_grad_norm`: gradients are scaled down when their norm over all
        parameters exceeds it. `recompute`: components that keep only the inputs of their slices and compute the rest
        again in backward, which takes less memory and a third more time. `shard_optimizer`: of the ranks that hold a
        parameter one keeps its optimizer states, updates it and sends it to the others, which takes less memory for the
        same traffic. `master_weights`: trained parameters that are bfloat16 have copies in float32, which the optimizer
        steps; their gradients are summed in float32. "none" steps them as they are. `reduce_dtype`: in which devices
        add up gradients; None: in which each device sums its own, so float32 for parameters with copies, and else the
        type of the parameters. `ema`: a running average of the weights is kept beside them, with this decay or as a
        spindle.EMA says; it is in checkpoints, and `export` writes it.
        """
        if max_grad_norm is not None and not 0 < max_grad_norm < float("inf"):
            raise WorkloadError(f"workload {name!r}: max_grad_norm is {max_grad_norm!r}; it must be positive, or None")
        if not is_whole(in_flight, 1) or not is_whole(accumulate, 1) or accumulate % in_flight:
            raise WorkloadError(
                f"workload {name!r}: accumulate is {accumulate!r}, in_flight {in_flight!r}; both are whole numbers, at "
                "least 1, and accumulate is a multiple of in_flight"
            )
        if precision not in get_args(Precision):
            raise WorkloadError(
                f"workload {name!r}: precision is {precision!r}; choose one of {', '.join(get_args(Precision))}"
            )
        _check_choice(name, "master_weights", master_weights, get_args(MasterWeights))
        _check_choice(name, "reduce_dtype", reduce_dtype, (*get_args(ReduceType), None))
        self.name = name
        self.accumulate = accumulate
        self.in_flight = in_flight
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        if isinstance(recompute, str | bool):
            raise WorkloadError(
                f"workload {name!r}: recompute is {recompute!r}; give a list of names of components, such as ['vision']"
            )
        self.recompute = frozenset(recompute)
        self.shard_optimizer = shard_optimizer
        self.master_weights: MasterWeights = master_weights
        self.reduce_dtype: ReduceType | None = reduce_dtype
        self.ema = EMA.of(ema)
        self.after_steps: list[AfterStep] = []
        self.components: dict[str, Component] = {}
        self.tasks: dict[str, Task] = {}
        self.filled: set[str] = set()  # components whose buffers have been read from their files
        self.stage: int | None = None  # of a training in stages: the step at which its stage ends
        self.captured: tuple[object, object] | None = None  # kept by `spindle.capture.capture`

    def only(self, tasks: Iterable[str]) -> "Workload":
        """The same workload with some of its tasks; modules and data are shared. Raises WorkloadError on another."""
        wanted = set(tasks)
        unknown = sorted(wanted - self.tasks.keys())
        if unknown or not wanted:
            raise WorkloadError(
                f"workload {self.name!r} has no task {unknown[0] if unknown else ''!r}"
                f"{did_you_mean(unknown[0], self.tasks) if unknown else ''}; "
                f"its tasks are {', '.join(self.tasks)}"
            )
        found = copy.copy(self)
        found.tasks = {
            name: dataclasses.replace(task, mixture=task.mixture and task.mixture.only(wanted))
            for name, task in self.tasks.items()
            if name in wanted
        }
        found.captured = None
        return found

    def mixture(self, weights: Mapping[str, float], *, temperature: float = 1.0, tasks_per_step: int = 1) -> None:
        """Let each step draw `tasks_per_step` different ones of these tasks, by their weights; the others rest in it.

        Weights are positive numbers of any scale, such as the sizes of the tasks' data sets. A task's share grows as
        its weight to the power of 1 / `temperature`: 1 takes the weights as they are, more makes shares more alike. The
        same tasks are drawn on all devices, and again after a resume: a draw depends on the run's seed and the step.

        Raises WorkloadError for a task that is not registered, stands in another mixture, or takes part by `every` or
        `probability`; and for weights, a temperature or a number of tasks that make no mixture.
        """
        found = Mixture.tempered(weights, temperature, tasks_per_step)
        for name in found.tasks:
            task = self.tasks.get(name)
            if task is None:
                raise WorkloadError(
                    f"a mixture names task {name!r}, which workload {self.name!r} does not have; register its tasks "
                    f"first (they are {', '.join(self.tasks) or 'none'})"
                )
            if task.mixture is not None or task.every > 1 or task.probability < 1:
                other = "stands in a mixture" if task.mixture is not None else "takes part by every= or probability="
                raise WorkloadError(f"a mixture names task {name!r}, which {other} already; let one of both say when")
        for name in found.tasks:
            self.tasks[name] = dataclasses.replace(self.tasks[name], mixture=found)

    def component(
        self,
        name: str,
        module: ModuleT | Callable[[], ModuleT],
        *,
        weights: Weights | Path | str | None = None,
        layers: str | nn.Module | Iterable[str | nn.Module] | None = None,
        optimizer: Mapping[str, float] | None = None,
        tensor_parallel: int = 1,
        tensor_plan: Mapping[str, str] | None = None,
        shard: Sharded | None = None,
        compile: Compile = False,
    ) -> ModuleT:
        """Register a part of the model and return it unchanged; call it in task functions as ever.

        `module`: a module, or, for one that is too large for this process, a function that builds it: then parameters
        take no memory here, and `weights` tells where ranks read theirs: a folder as `save_pretrained` writes it, or
        Weights with a prefix or other names (docs/large_models.md). A module built under `torch.device("meta")`, or by
        `init_empty_weights` of accelerate, is trained in the same way.

        `layers`: lists of repeated blocks and single blocks, as dotted paths or as the modules themselves; None finds
        them, () makes no blocks, [module] makes it one block as a whole. `optimizer`: settings of this component's
        parameter group, such as {"lr": 1e-5, "weight_decay": 0.0}. Tasks that use the component share its parameters.
        Of a module that DistributedDataParallel or torch.compile wraps, the plain module is trained, under its own
        names.

        `tensor_parallel`: plans may spread blocks, embedding and head over this number of devices, or a divisor of it.
        `tensor_plan` says how their layers are cut, as {"layers.*.q_proj": "colwise", "layers.*.o_proj": "rowwise"};
        None takes the model's own plan, as transformers' language models have one.

        `shard`: with "parameters" the component runs on all devices, and each keeps a part of every layer's parameters,
        gradients and optimizer states (as FSDP2 and ZeRO-3 do); a layer is gathered when it is computed. With None the
        planner does so where nothing else fits or where it is quicker, with "nothing" never.

        `compile`: devices compile its layers by `torch.compile`, one code for all equal ones. True, or a dict of what
        torch.compile takes: {"mode": "max-autotune-no-cudagraphs", "dynamic": True, "backend": "inductor"}. Code
        between layers stays as it is.

        Raises WorkloadError on a name taken or malformed, a module registered before, a layer that is not inside it,
        both tensor_parallel and shard, or what `compile` cannot be.
        """
        _check_name("component", name, self.components)
        if not isinstance(module, nn.Module | type) and callable(module):
            module = built_empty(module)
        if not isinstance(module, nn.Module):
            raise WorkloadError(
                f"component {name!r} is a {type(module).__name__}; give a torch.nn.Module, or a function that builds "
                "one (lambda: Model(config))"
            )
        for other in self.components.values():
            if other.module is _unwrapped(module):
                raise WorkloadError(
                    f"component {name!r} is the module of component {other.name!r}; register it once and use it twice"
                )
        plain = _unwrapped(module)
        given = [layers] if isinstance(layers, str | nn.Module) else layers
        paths = None if given is None else tuple(_path(name, plain, layer) for layer in given)
        if tensor_parallel < 1:
            raise WorkloadError(f"component {name!r}: tensor_parallel is {tensor_parallel}; it must be at least 1")
        if shard not in (None, *get_args(Sharded)):
            raise WorkloadError(f"component {name!r}: shard is {shard!r}; give 'parameters', 'nothing', or None")
        if shard == "parameters" and tensor_parallel > 1:
            raise WorkloadError(
                f"component {name!r}: tensor_parallel is {tensor_parallel} and shard is {shard!r}; both divide its "
                "parameters, so leave one out"
            )
        files = Weights(weights) if isinstance(weights, Path | str) else weights
        self.components[name] = Component(
            name,
            plain,
            paths,
            dict(optimizer or {}),
            tensor_parallel,
            tensor_plan,
            files,
            shard,
            Compilation.of(name, compile),
        )
        return cast("ModuleT", module)

    def task(
        self,
        name: str,
        *,
        batch_size: int,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        weight: float = 1.0,
        every: int = 1,
        probability: float = 1.0,
        on_end: OnEnd = "restart",
        prefetch: int = 1,
        rows: RowsFunction | None = None,
        weigh: Weigh = "micro-batches",
    ) -> Callable[[FunctionT], FunctionT]:
        """Decorator that registers a task function: a batch (a dict of fields) in, a scalar loss out.

        `data`: an iterable of batches, or a function that returns one; it must give the same batches in each process,
        and gets the number of each pass where it, its sampler or its data set has `set_epoch`. `weight` multiplies
        the task's loss in the sum; a task of weight 0 runs forward only, as under `torch.no_grad()`, and gives nothing
        a gradient. The task takes part in every `every`-th step, or in each step with `probability`; parameters that no
        task of a step uses rest in it. When its data ends, `on_end` starts it over, stops the training before a step
        that lacks a batch, or ends it with an error. `prefetch` batches are read ahead while others train. A
        `ray.data.Dataset` gives batches of `batch_size` samples (docs/ray.md).

        Every dimension of a field may differ from batch to batch, and so may the number of samples. `rows`: a function
        from a batch to the number of rows that each sample has in each packed field, as
        {"pixel_values": patches, "image_grid_thw": images}; see docs/packed.md.

        `weigh`: what the loss of each of a step's batches counts, where `accumulate` takes several: "micro-batches" all
        alike, "samples" by their samples, or by what the loss is a mean of, as the name of a field that holds the
        count, or a function from the batch to it, such as lambda batch: (batch["labels"] != -100).sum(). A batch that
        counts 0 contributes nothing, whatever its loss is.

        Raises WorkloadError on values that are none of these, and when the data draw from a generator that another
        task's data draw from.
        """
        _check_name("task", name, self.tasks)
        if not is_whole(batch_size, 1):
            raise WorkloadError(f"task {name!r}: batch_size is {batch_size!r}; it must be a whole number, at least 1")
        if not 0 <= weight < float("inf"):
            raise WorkloadError(f"task {name!r}: weight is {weight!r}; it must be zero or a positive number")

        if not is_whole(every, 1) or not 0 < probability <= 1 or (every > 1 and probability < 1):
            raise WorkloadError(
                f"task {name!r}: every is {every!r}, probability {probability!r}; give a step count from 1 up, or a "
                "probability above 0 and up to 1, not both"
            )
        if on_end not in get_args(OnEnd):
            raise WorkloadError(f"task {name!r}: on_end is {on_end!r}; choose one of {', '.join(get_args(OnEnd))}")
        check_weigh(f"task {name!r}", weigh)
        if not is_whole(prefetch, 0):
            raise WorkloadError(f"task {name!r}: prefetch is {prefetch!r}; it must be 0 or more batches")

        data = batches_of(f"task {name!r}", data, batch_size)
        check_apart(f"task {name!r}", data, {other: task.data for other, task in self.tasks.items() if other != name})

        def register(function: FunctionT) -> FunctionT:
            self.tasks[name] = Task(
                name=name,
                function=function if weight else forward_only(function),
                batch_size=batch_size,
                data=data,
                weight=weight,
                every=every,
                probability=probability,
                on_end=on_end,
                prefetch=prefetch,
                rows=rows,
                weigh=weigh,
            )
            return function

        return register

    def after_step(self, *parameters: str) -> Callable[[AfterFunctionT], AfterFunctionT]:
        """Decorator that registers a function for some parameters: it is called with each of them after every step in
        which the optimizer has stepped it, and changes it in place or returns what it is to be.

        `parameters`: names as in `named_parameters`, such as "clip.logit_scale"; "*" stands for any part. It gets the
        parameter as a whole, or, if it treats each number by itself, the part that a device has; of a bfloat16
        parameter its float32 copy. It is called on each device that updates the parameter, so it uses this alone.

        Raises WorkloadError without a name.
        """
        if not parameters or not all(isinstance(name, str) for name in parameters):
            raise WorkloadError(
                f"after_step is given {parameters!r}; give names of parameters, as in "
                "@workload.after_step('clip.logit_scale')"
            )

        def register(function: AfterFunctionT) -> AfterFunctionT:
            self.after_steps.append(AfterStep(parameters, function))
            return function

        return register

    def require_tasks(self) -> None:
        """Raise WorkloadError when there is nothing to plan."""
        if not self.tasks:
            raise WorkloadError(f"workload {self.name!r} has no tasks; add one with @workload.task(...)")
        unknown = sorted(self.recompute - self.components.keys())
        if unknown:
            raise WorkloadError(
                f"workload {self.name!r}: recompute names {unknown[0]!r}, which is no component"
                f"{did_you_mean(unknown[0], self.components)}; "
                f"the components are {', '.join(self.components)}"
            )

    def changed_whole(self) -> set[str]:
        """Parameters of which a function of `after_step` needs the whole."""
        parameters = dict(self.named_parameters()) if self.after_steps else {}
        found: set[str] = set()
        for each in self.after_steps:
            names = each.names(parameters)
            found.update(n for n in names if not each.is_elementwise([tuple(parameters[n].shape)]))
        return found

    @property
    def shard_parameters(self) -> tuple[str, ...]:
        """Components whose parameters are to be sharded."""
        return tuple(sorted(c.name for c in self.components.values() if c.shard == "parameters"))

    @property
    def optimizer_settings(self) -> dict[str, Mapping[str, float]]:
        """Settings of the optimizer, by the components that have some."""
        return {c.name: c.optimizer for c in self.components.values() if c.optimizer}

    def tasks_of(self, step: int, seed: int) -> tuple[str, ...]:
        """Tasks that take part in a step."""
        return tuple(name for name, task in self.tasks.items() if task.takes_part(step, seed))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters as `component.path`; one that is tied under several names comes once, under the first."""
        seen: set[int] = set()
        for component in self.components.values():
            for path, parameter in component.module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{component.name}.{path}", parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers as `component.path`, each once."""
        seen: set[int] = set()
        for component in self.components.values():
            for path, buffer in component.module.named_buffers():
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield f"{component.name}.{path}", buffer


def forward_only(function: TaskFunction) -> TaskFunction:
    """The same function without gradients."""

    @functools.wraps(function)
    def forward(batch: Batch) -> Any:
        with torch.no_grad():
            return function(batch)

    return forward


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that only other ways of training need."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]  # of torch.compile, whose class takes seconds to import
        else:
            return module


def _path(component: str, module: nn.Module, layer: str | nn.Module) -> str:
    """The dotted path of a layer below its component."""
    if isinstance(layer, str):
        return layer
    if not isinstance(layer, nn.Module):
        raise WorkloadError(
            f"component {component!r}: layers holds a {type(layer).__name__}; give modules of it, or their dotted "
            "paths (a function has no parameters to plan; put it into a module)"
        )
    for path, inner in module.named_modules():
        if inner is _unwrapped(layer):
            return str(path)
    raise WorkloadError(
        f"component {component!r}: layers holds a {type(layer).__name__} that is not inside it; give modules that it "
        "holds, or register this one as a component of its own"
    )


def _check_choice(workload: str, what: str, value: object, choices: Iterable[object]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise WorkloadError(f"workload {workload!r}: {what} is {value!r}; choose one of {listed}")


def _check_name(what: str, name: str, taken: Mapping[str, object]) -> None:
    if not _NAME.fullmatch(name):
        raise WorkloadError(f"{what} {name!r}: a name starts with a letter; letters, digits, '_' and '-' follow")
    if name in taken:
        raise WorkloadError(f"{what} {name!r} is registered already; choose another name")
