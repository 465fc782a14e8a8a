"""WorkloadSpec: components (spindle.spec.blocks) and the tasks that run them, as values with their rules.

`spindle.spec.file.read_workload` reads one from YAML; `spindle.spec.graph.build_graph` makes its TaskGraph.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from spindle.errors import WorkloadError
from spindle.spec.blocks import Component, Transformer, check_dtype
from spindle.values.cost_options import CostOptions, Optimizer, length_spread, log_normal_lengths
from spindle.values.execution import USUAL, Execution, Parallel
from spindle.values.presence import Presence, task_sets
from spindle.words.nearest import did_you_mean

LossKind = Literal["contrastive", "cross_entropy", "mse", "l1", "diffusion", "other"]
LOSS = "loss"  # name of a task's own loss operator, hence no name for a component


@dataclass(frozen=True, slots=True)
class Edge:
    """Component `source` hands its output to `target`; None: as many bytes as the output has."""

    source: str
    target: str
    payload_bytes_per_sample: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: which components it runs, in which order, on how many samples a step.

    weight         factor of its loss
    probability    share of the steps in which it takes part
    every          it takes part in every such step, the first included
    rate           how often it runs in a step, each time on a batch of its own; gradients add up
    forward_only   nothing of it is trained (a teacher, an evaluation)
    tokens, tokens_p99, instances, context_tokens   (component, value): what differs from the component's own
    lora_rank      (component, rank): adapters of this task alone, beside what it shares
    """

    name: str
    batch_size: int
    components: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    loss: LossKind = "other"
    weight: float = 1.0
    probability: float = 1.0
    every: int = 1
    rate: int = 1
    forward_only: bool = False
    tokens: tuple[tuple[str, int], ...] = ()
    tokens_p99: tuple[tuple[str, int], ...] = ()
    instances: tuple[tuple[str, int], ...] = ()
    context_tokens: tuple[tuple[str, int], ...] = ()
    lora_rank: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise WorkloadError(f"task {self.name!r}: batch_size is {self.batch_size}; it must be at least one")
        if not self.components:
            raise WorkloadError(f"task {self.name!r} runs no component; give it a flow")
        if not 0 < self.probability <= 1:
            raise WorkloadError(f"task {self.name!r}: probability is {self.probability!r}; give 0 < probability <= 1")
        if self.every < 1 or (self.every > 1 and self.probability < 1):
            raise WorkloadError(
                f"task {self.name!r}: every is {self.every}, probability {self.probability!r}; give a step count from "
                "1 up, or a probability above 0 and up to 1, not both"
            )
        if self.rate < 1:
            raise WorkloadError(f"task {self.name!r}: rate is {self.rate}; it must be at least one run a step")
        if not 0 <= self.weight < float("inf"):
            raise WorkloadError(f"task {self.name!r}: weight is {self.weight!r}; it must be zero or more")
        self._check_members()
        self._check_loss()

    def _check_members(self) -> None:
        if len(set(self.components)) != len(self.components):
            twice = next(name for name in self.components if self.components.count(name) > 1)
            raise WorkloadError(
                f"task {self.name!r} names component {twice!r} twice; a component runs once in a task, "
                "give it instances: 2 to run it on two inputs"
            )
        pairs = [(edge.source, edge.target) for edge in self.edges]
        for pair in pairs:
            if pairs.count(pair) > 1:
                raise WorkloadError(f"task {self.name!r}: edge {pair[0]} -> {pair[1]} is given twice; give it once")
        named = [("flow", end) for edge in self.edges for end in (edge.source, edge.target)]
        for label in ("tokens", "tokens_p99", "instances", "context_tokens", "lora_rank"):
            named += [(label, name) for name, _ in getattr(self, label)]
        for label, name in named:
            if name not in self.components:
                raise WorkloadError(
                    f"task {self.name!r}: {label} names {name!r}, which is not in its flow; "
                    f"the flow has {', '.join(self.components)}"
                )

    def _check_loss(self) -> None:
        if self.loss == "contrastive" and len(self.sinks) < 2:
            raise WorkloadError(
                f"task {self.name!r}: a contrastive loss compares at least two components, the flow ends in "
                f"{', '.join(self.sinks) or 'none'}; end it in two, as in flow: [[image, text]]"
            )

    @property
    def runs(self) -> tuple["Task", ...]:
        """The task as often as it runs in a step; runs beyond the first are named as micro-batches are (task#1)."""
        return (self, *(replace(self, name=f"{self.name}#{index}") for index in range(1, self.rate)))

    @property
    def sinks(self) -> tuple[str, ...]:
        """Components that hand nothing to another: the loss reads them."""
        sources = {edge.source for edge in self.edges}
        return tuple(name for name in self.components if name not in sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Components and the tasks that run them.

    dtype        of parameters and activations where a component does not say otherwise
    recompute, shard_optimizer, shard_parameters   memory choices (`cost_options`) that the plan is to make; the
                 last one names components
    execution    how layers, attention, optimizer and reductions are run
    layout       how the workload is run today: a plan is compared with it
    may_offload  optimizer states may go to the host's memory where nothing else fits
    tensor_parallel, min_tensor_parallel   of components that do not say otherwise
    """

    name: str
    components: tuple[Component, ...]
    tasks: tuple[Task, ...]
    title: str = ""
    dtype: str = "bfloat16"
    optimizer: Optimizer = "adamw"
    recompute: bool = False
    shard_optimizer: bool = False
    shard_parameters: tuple[str, ...] = ()
    execution: Execution = USUAL
    layout: Parallel | None = None
    may_offload: bool = False
    tensor_parallel: int = 1
    min_tensor_parallel: int = 1

    def __post_init__(self) -> None:
        _check_names("component", (component.name for component in self.components))
        _check_names("task", (task.name for task in self.tasks))
        known = {component.name for component in self.components}
        if LOSS in known:
            raise WorkloadError(f"a component is named {LOSS!r}, as are a task's losses; choose another name")
        for task in self.tasks:
            for name in task.components:
                if name not in known:
                    raise WorkloadError(
                        f"task {task.name!r} runs component {name!r}, which is not given{did_you_mean(name, known)}; "
                        f"the components are {', '.join(sorted(known))}"
                    )
        for name in self.shard_parameters:
            if name not in known:
                raise WorkloadError(
                    f"shard_parameters names {name!r}, which is no component{did_you_mean(name, known)}; "
                    f"the components are {', '.join(sorted(known))}"
                )
        check_dtype(f"workload {self.name!r}", self.dtype)
        for component in self.components:
            self._degrees(component)
        for task in self.tasks:
            self._check_task(task)

    def _check_task(self, task: Task) -> None:
        """Adapters stand beside matrices of layers; what follows a part that learns without backward does so too."""
        for name, rank in task.lora_rank:
            if rank < 1 or not isinstance(self.component(name), Transformer):
                raise WorkloadError(
                    f"task {task.name!r}: lora_rank of {name!r} is {rank}; adapters of a task need a positive rank and "
                    "a transformer"
                )
        for edge in task.edges:
            ends = [self.component(name) for name in (edge.source, edge.target)]
            if ends[0].update == "zeroth_order" and ends[1].update != "zeroth_order":
                raise WorkloadError(
                    f"task {task.name!r}: {edge.source!r} has update: zeroth_order, so each of its two forwards needs "
                    f"a loss, but {edge.target!r} behind it runs once; give {edge.target!r} update: zeroth_order too"
                )

    def _degrees(self, component: Component) -> tuple[int, ...]:
        """Degrees of tensor parallelism of a component, rising. Raises WorkloadError when there is none."""
        most = self.tensor_parallel if component.tensor_parallel is None else component.tensor_parallel
        own = component.min_tensor_parallel
        least = self.min_tensor_parallel if own is None else own
        if own is None and component.tensor_parallel is not None:
            least = min(least, most)  # a component that says how far it may be spread is not held to the others' least
        if least < 1 or most < least:
            raise WorkloadError(
                f"component {component.name!r}: tensor_parallel is {most} and min_tensor_parallel {least}; give "
                "numbers of devices, the second from 1 up to the first"
            )
        found = tuple(degree for degree in range(least, most + 1) if component.splits_over(degree))
        if not found:
            raise WorkloadError(
                f"component {component.name!r}: no tensor_parallel degree from {least} to {most} divides its heads "
                "(and its kv_heads, or is a multiple of them); give a range that holds one"
            )
        return found

    def component(self, name: str) -> Component:
        """The component of that name."""
        return next(component for component in self.components if component.name == name)

    def component_in(self, task: Task, name: str) -> Component:
        """The component with the task's own tokens and instances; what it hands on grows with its tokens."""
        component = self.component(name)
        given = (("tokens", task.tokens), ("tokens_p99", task.tokens_p99), ("instances", task.instances))
        changes = {label: dict(values)[name] for label, values in given if name in dict(values)}
        ratio = changes.get("tokens", component.tokens) / component.tokens
        if component.output_tokens is not None and component.output_tokens > 1:
            changes.setdefault("output_tokens", max(round(component.output_tokens * ratio), 1))
        if component.tokens_p99 is not None:
            changes.setdefault("tokens_p99", max(round(component.tokens_p99 * ratio), changes.get("tokens", 1)))
        return replace(component, **changes) if changes else component  # type: ignore[arg-type]

    @property
    def cost_options(self) -> CostOptions:
        """What `spindle.cost.metaops` needs to know about it."""
        spreads = []
        for task in self.tasks:
            for name in task.components:
                component = self.component_in(task, name)
                if component.tokens_p99 is not None:
                    spread = length_spread(component.tokens, component.tokens_p99)
                    spreads += [(run.name, name, spread) for run in task.runs]
        degrees = tuple((component.name, self._degrees(component)) for component in self.components)
        is_spread = any(allowed != (1,) for _, allowed in degrees)
        return CostOptions(
            optimizer=self.optimizer,
            recompute=self.recompute,
            shard_optimizer=self.shard_optimizer,
            shard_parameters=tuple(sorted(self.shard_parameters)),
            execution=self.execution,
            layout=self.layout,
            tensor_parallel=max(allowed[-1] for _, allowed in degrees),
            min_tensor_parallel=min(allowed[0] for _, allowed in degrees),
            degrees=degrees if is_spread else (),
            may_offload=self.may_offload,
            length_spread=tuple(spreads),
        )

    def steps(self, count: int = 12) -> tuple["WorkloadSpec", ...]:
        """The same for batches whose samples' lengths were drawn, each of their mean length; () where all are alike."""
        if not self.cost_options.length_spread:
            return ()
        return tuple(
            replace(self, tasks=tuple(self._drawn(task, random.Random(f"{task.name}/{step}")) for task in self.tasks))
            for step in range(count)
        )

    def _drawn(self, task: Task, source: random.Random) -> Task:
        tokens = dict(task.tokens)
        for name in task.components:
            component = self.component_in(task, name)
            if component.tokens_p99 is not None:
                lengths = log_normal_lengths(component.tokens, component.tokens_p99, task.batch_size, source)
                tokens[name] = max(1, round(sum(lengths) / task.batch_size))
        return replace(task, tokens=tuple(tokens.items()))

    def task_sets(self, *, at_most: int = 64) -> tuple[tuple[float, "WorkloadSpec"], ...]:
        """(probability, workload) of every set of tasks that a step may have, likeliest first; empty steps left out.

        Tasks with probability 1 are in all of them. The expected step is the sum of probability * step over all sets.
        Raises WorkloadError when there are more than `at_most` sets.
        """
        occasional = [task for task in self.tasks if task.probability < 1]
        if 2 ** len(occasional) > at_most:
            raise WorkloadError(
                f"{len(occasional)} tasks take part in some steps only, which makes {2 ** len(occasional)} sets; "
                f"give at most {at_most} sets: fix the probability of all but {at_most.bit_length() - 1} tasks at 1"
            )
        return tuple((found.share, self.only(found.tasks)) for found in task_sets(self.presences) if found.tasks)

    @property
    def presences(self) -> tuple[Presence, ...]:
        """How often each task takes part."""
        return tuple(Presence(task=task.name, probability=task.probability, every=task.every) for task in self.tasks)

    def only(self, tasks: Iterable[str]) -> "WorkloadSpec":
        """The same workload with some of its tasks, in the order of the spec; WorkloadError on an unknown one."""
        wanted = set(tasks)
        known = [task.name for task in self.tasks]
        unknown = sorted(wanted - set(known))
        if unknown:
            raise WorkloadError(
                f"task {unknown[0]!r} is not in workload {self.name!r}{did_you_mean(unknown[0], known)}; "
                f"its tasks are {', '.join(known)}"
            )
        return replace(self, tasks=tuple(task for task in self.tasks if task.name in wanted))


def stages_to_edges(stages: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], tuple[Edge, ...]]:
    """Components and edges of a flow in stages: every component of a stage feeds every one of the next.

    >>> stages_to_edges([["image", "text"], ["llm"]])[1]
    (Edge(source='image', target='llm', payload_bytes_per_sample=None), \
Edge(source='text', target='llm', payload_bytes_per_sample=None))
    """
    listed = [tuple(stage) for stage in stages]
    names = tuple(name for stage in listed for name in stage)
    pairs = ((a, b) for before, after in pairwise(listed) for a in before for b in after)
    return names, tuple(Edge(a, b) for a, b in pairs)


def _check_names(label: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or not all(part.isalnum() for part in name.replace("_", "-").split("-")):
            raise WorkloadError(f"{label} name {name!r}: use letters, digits, - and _ (dots separate operator names)")
        if name in seen:
            raise WorkloadError(f"{label} {name!r} is given twice; names must be unique")
        seen.add(name)
    if not seen:
        raise WorkloadError(f"the workload has no {label}s; give at least one")
