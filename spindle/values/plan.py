"""Plan: which layers of which MetaOp run on which devices, and when. All that crosses from planner to runtime.

- A slice is a run of consecutive layers of one MetaOp on one set of devices (the paper's ASL-tuple, placed).
- A wave is the set of slices that start together; waves stand in order of start. No barrier stands between waves.
- Times are those of forward and backward together; `forward_fraction` of each MetaOp tells the share of forward.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from spindle.errors import PlanError
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.outlook import Outlook
from spindle.values.turns import Turns, check_turns, numbered

BUCKET_BYTES = 25 * 2**20  # as PyTorch's DistributedDataParallel has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Layers `first_layer` .. `first_layer + num_layers - 1` of a MetaOp on `devices` from start_s to end_s.

    Each `tensor_parallel` devices that follow each other hold one copy of the layers between them; the batch is divided
    over the copies.
    """

    metaop: str
    first_layer: int
    num_layers: int
    devices: tuple[int, ...]
    start_s: float
    end_s: float
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or len(self.devices) % self.tensor_parallel:
            raise PlanError(
                f"slice of {self.metaop!r}: tensor_parallel is {self.tensor_parallel} on {len(self.devices)} devices; "
                "it must divide their number"
            )
        if self.first_layer < 0 or self.num_layers < 1:
            raise PlanError(
                f"slice of {self.metaop!r}: layers {self.first_layer}..+{self.num_layers}; "
                "the first is 0 or more and there is at least one"
            )
        if not self.devices or min(self.devices) < 0 or len(set(self.devices)) != len(self.devices):
            raise PlanError(
                f"slice of {self.metaop!r} names devices {list(self.devices)}; name at least one, each once, from 0 up"
            )
        if not 0 <= self.start_s <= self.end_s < float("inf"):
            raise PlanError(f"slice of {self.metaop!r} runs from {self.start_s!r} to {self.end_s!r}; give rising times")

    @property
    def last_layer(self) -> int:
        """Index of its last layer."""
        return self.first_layer + self.num_layers - 1

    @property
    def span_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Slices that start together, in order of their first device; ends when the last of them ends."""

    index: int
    start_s: float
    end_s: float
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Predicted peak bytes of each device, and whether every device holds its share."""

    peak_bytes_per_device: tuple[float, ...] = ()
    fits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What people would train the workload with instead of a plan, under the memory choice that is fastest for it.

    name         in words that people who train models know
    step_s       seconds of a step, the mean where batches differ; 0 where it does not fit
    choice       how it is run so that it fits; `recompute` and `shard_optimizer` are part of it
    peak_bytes   of the fullest device; where it does not fit, those of the choice that takes least (0: not known)
    fits         whether any choice does
    """

    name: str
    step_s: float = 0.0
    choice: str = ""
    peak_bytes: float = 0.0
    fits: bool = True
    recompute: bool = False
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.step_s < float("inf") and 0 <= self.peak_bytes < float("inf")):
            raise PlanError(
                f"{self.name!r} takes {self.step_s!r} s and {self.peak_bytes!r} bytes; give numbers of zero or more"
            )
        if self.fits and not self.step_s:
            raise PlanError(f"{self.name!r} fits and its step takes {self.step_s!r} s; give the seconds of its step")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step does, whatever the plan: samples of all tasks, tokens (positions that each component computes, summed
    over components), and floating-point operations of forward and backward without any that are done again.
    """

    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= value < float("inf") for value in (self.samples, self.tokens, self.flops)):
            raise PlanError(f"a step does {self.samples!r} samples, {self.tokens!r} tokens and {self.flops!r} FLOPs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRange:
    """Entries of a field of a task's batches, or their "samples": the least and the most in the batches read."""

    task: str
    field: str
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise PlanError(
                f"sizes of {self.field!r} of task {self.task!r} go from {self.least} to {self.most}; they must rise"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpread:
    """Predicted seconds of `steps` steps whose batches have other sizes: mean, and 10th and 90th percentile; means of
    the baselines, by name.
    """

    steps: int
    mean_s: float
    p10_s: float
    p90_s: float
    baselines_s: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.p10_s <= self.p90_s < float("inf") or not 0 <= self.mean_s < float("inf"):
            raise PlanError(
                f"a step takes {self.p10_s!r} to {self.p90_s!r} s, {self.mean_s!r} s on average of {self.steps}; give "
                "rising times of at least one step"
            )


MOST_EDGES = 257  # a check takes their square


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePrices:
    """Prices over time that prove a horizon, the last of `edges_s`: no schedule ends by it.

    edges_s         K + 1 times from 0 up; between them stand K intervals
    device_prices   p: of a device-second, by interval
    wait_prices     q: for flows (m, s), of each second after s has started less each second after m has ended, by
                    interval; since m ends before s starts, this is never more than 0

    A schedule that ends by the horizon pays at most N sum p_k d_k for device time. Each MetaOp pays at least the
    minimum, over its start S and its end E, of its layers' device time in [S, E], plus the seconds after S at the
    prices q of flows into it, less those after E at the prices q of flows out of it. Where these are more in sum, no
    schedule exists.
    """

    edges_s: tuple[float, ...]
    device_prices: tuple[float, ...]
    wait_prices: tuple[tuple[str, str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.edges_s or self.edges_s[0] != 0 or any(a >= b for a, b in pairwise(self.edges_s)):
            raise PlanError("the edges of a certificate over time do not rise from 0; plan again")
        if len(self.edges_s) > MOST_EDGES:
            raise PlanError(
                f"a certificate over time has {len(self.edges_s)} edges; at most {MOST_EDGES} are checked, plan again"
            )
        for prices in (self.device_prices, *(prices for _, _, prices in self.wait_prices)):
            if len(prices) != len(self.edges_s) - 1 or any(price < 0 for price in prices):
                raise PlanError("a certificate over time needs one price of 0 or more for each interval; plan again")
        if not any(self.device_prices):
            raise PlanError("a certificate over time gives device time no price, which proves nothing; plan again")

    @property
    def horizon_s(self) -> float:
        """What the prices prove."""
        return self.edges_s[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Prices that prove a lower bound; a reader of the curves can verify it by arithmetic alone.

    With area_price a, paths of weight w, and p(m) the weight of all paths through MetaOp m, every schedule on N devices
    lasts at least  sum over m of layers(m) * min over n of T_m(n) * (a * n + p(m)),  divided by  a * N + sum of w.
    A path names MetaOps that wait for each other, first to last.

    With `through`, the bound is that of `head` over all that `through` waits for, plus its fastest time, plus that of
    `tail` over all that waits for it; None where there is nothing. Prices `over_time` prove a second, larger bound.
    """

    area_price: float = 0.0
    paths: tuple[tuple[float, tuple[str, ...]], ...] = ()
    through: str = ""
    head: "Certificate | None" = None
    tail: "Certificate | None" = None
    over_time: TimePrices | None = None

    def __post_init__(self) -> None:
        if self.area_price < 0 or any(weight < 0 for weight, _ in self.paths):
            raise PlanError("a certificate has a negative price; prices are 0 or more, plan again")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStep:
    """A step in which only some tasks take part.

    share          of the steps that have exactly these tasks
    step_s         of such a step under the plan, which leaves out the slices of the others
    sequential_s   of such a step with all devices on one task after another; 0: does not fit
    """

    share: float
    tasks: tuple[str, ...]
    step_s: float
    sequential_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule of a whole MetaGraph.

    makespan_s        end of the last slice
    lower_bound_s     no schedule of this MetaGraph on these devices is shorter; `certificate` proves it
    baselines_s       makespans of the baselines, by name, in the same cost model
    reduction_s       gradient reductions after the last backward slice
    update_s          the optimizer's step after the last reduction
    step_s            a whole step: all forward slices, backward in reverse, reductions, update (0: not predicted)
    baseline_steps_s  the same of the baselines, by name
    recompute, shard_optimizer   how it must be trained so that it fits: activations of all components recomputed in
                      backward, each optimizer state on one of the devices that share it; a run of the plan does so
    shard_parameters  components of which each device keeps a part of every layer's parameters, gradients and states;
                      all slices of such a component run on the same devices
    metagraph         what was planned (without operators), so that a plan can be checked and explained by itself
    cluster           what it was planned for; with it the checker also verifies transfers and memory
    spread            steps of batches of other sizes; None: all that was seen are alike
    sizes             of the batches that it was made for
    alternatives      what people would use instead, in the same cost model; () where they were not costed
    work              what a step does; None: not known
    fixed_s           of each step, of this plan and of the baselines alike: what a calibration adds (data, logging)
    outlook           how sure the prediction is; None where nobody has asked
    task_sets         steps in which some tasks are absent; (): all tasks take part in every step
    bucket_bytes      of gradients that are reduced together: small buckets start earlier, large ones pay less latency
    workload          name of what was planned, for people; "" where it has none
    turns             tasks by turn: each turn runs forward and backward before the next one begins, so that only its
                      activations are kept; gradients add up over the step. (): all tasks at once
    """

    num_devices: int
    devices_per_node: int
    method: str
    waves: tuple[Wave, ...]
    makespan_s: float
    lower_bound_s: float = 0.0
    planner_s: float = 0.0
    baselines_s: tuple[tuple[str, float], ...] = ()
    reduction_s: float = 0.0
    update_s: float = 0.0
    step_s: float = 0.0
    baseline_steps_s: tuple[tuple[str, float], ...] = ()
    memory: Memory = Memory()
    recompute: bool = False
    shard_optimizer: bool = False
    shard_parameters: tuple[str, ...] = ()
    certificate: Certificate | None = None
    metagraph: MetaGraph | None = None
    cluster: Cluster | None = None
    spread: StepSpread | None = None
    sizes: tuple[SizeRange, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    work: StepWork | None = None
    fixed_s: float = 0.0
    outlook: Outlook | None = None
    task_sets: tuple[SetStep, ...] = ()
    turns: Turns = ()
    bucket_bytes: int = BUCKET_BYTES
    workload: str = ""

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.devices_per_node < 1:
            raise PlanError(
                f"the plan names {self.num_devices} devices, {self.devices_per_node} a node; both are at least 1"
            )
        if not 0 <= self.fixed_s < float("inf"):
            raise PlanError(f"the plan adds {self.fixed_s!r} s to each step; give seconds, zero or more")
        if not self.waves:
            raise PlanError("the plan has no waves; plan a workload with at least one MetaOp")
        if self.bucket_bytes < 1:
            raise PlanError(f"the plan reduces gradients {self.bucket_bytes} bytes at a time; give at least one")
        check_turns(self.turns, self.metagraph)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All slices in order of start."""
        return tuple(self)

    def __iter__(self) -> Iterator[Slice]:
        for wave in self.waves:
            yield from wave.slices

    def __str__(self) -> str:
        """The Gantt chart, legend and summary that `spindle plan` prints."""
        from spindle.planner.report.render import render

        return render(self)

    @property
    def gap(self) -> float:
        """Distance from the bound: makespan / bound - 1; 0 when no bound is known."""
        return self.makespan_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0

    @property
    def idle_fraction(self) -> float:
        """Share of device time in which no slice runs."""
        busy = sum(s.span_s * len(s.devices) for s in self.slices)
        return 1 - busy / (self.makespan_s * self.num_devices) if self.makespan_s else 0.0

    @property
    def compared(self) -> Literal["mean step", "step", "makespan"]:
        """What is compared with the baselines: steps if they are predicted, their mean where batches differ."""
        if self.spread is not None and (self.spread.baselines_s or self.alternatives):
            return "mean step"
        return "step" if self.step_s and (self.baseline_steps_s or self.alternatives) else "makespan"

    @property
    def usual_ways(self) -> tuple[tuple[str, float], ...]:
        """Seconds of what is compared, by name: of the alternatives that fit and of the paper's planner; where none
        were costed, of the other methods.
        """
        if self.compared == "makespan":
            return self.baselines_s
        steps = self.baseline_steps_s
        if self.compared == "mean step":
            assert self.spread is not None
            steps = self.spread.baselines_s
        if self.alternatives:
            others = ((other.name, other.step_s) for other in self.alternatives if other.fits)
            steps = (*others, *(pair for pair in steps if pair[0] == "paper"))
        return steps

    @property
    def compared_s(self) -> float:
        """Seconds of what is compared, of this plan."""
        return self.makespan_s if self.compared == "makespan" else self.expected_s

    @property
    def expected_s(self) -> float:
        """Seconds of a step: the mean where batches differ."""
        return self.step_s if self.spread is None else self.spread.mean_s

    @cached_property
    def turn_by_task(self) -> dict[str, int]:
        """Number of the turn in which each task runs, from 0 up; empty where all run at once."""
        return numbered(self.turns)

    def wave_of(self, slice_: Slice) -> int:
        """Index of the wave in which `slice_` starts."""
        return self._wave_by_slice[slice_]

    @cached_property
    def _wave_by_slice(self) -> dict[Slice, int]:
        return {s: wave.index for wave in self.waves for s in wave.slices}


def make_waves(slices: Iterable[Slice], *, tolerance_s: float = 1e-12) -> tuple[Wave, ...]:
    """Group slices into waves: slices that start within `tolerance_s` of a wave's first slice belong to it."""
    ordered = sorted(slices, key=lambda s: (s.start_s, s.devices, s.metaop, s.first_layer))
    groups: list[list[Slice]] = []
    for slice_ in ordered:
        if groups and slice_.start_s - groups[-1][0].start_s <= tolerance_s:
            groups[-1].append(slice_)
        else:
            groups.append([slice_])
    return tuple(
        Wave(
            index=index,
            start_s=min(s.start_s for s in group),
            end_s=max(s.end_s for s in group),
            slices=tuple(sorted(group, key=lambda s: (s.devices, s.metaop, s.first_layer))),
        )
        for index, group in enumerate(groups)
    )


def laid_out(plan: Plan, metagraph: MetaGraph) -> Plan:
    """The plan with each slice in the layout, data and tensor parallel, that its MetaOp's time is of."""
    waves = tuple(
        replace(
            wave,
            slices=tuple(
                replace(s, tensor_parallel=metagraph[s.metaop].degree_on(len(s.devices))) for s in wave.slices
            ),
        )
        for wave in plan.waves
    )
    return replace(plan, waves=waves)


def without_operators(metagraph: MetaGraph) -> MetaGraph:
    """The MetaGraph as a plan carries it: costs and flows, not what was contracted."""
    return replace(metagraph, metaops=tuple(replace(metaop, operators=()) for metaop in metagraph.metaops))


def sorted_pairs(values: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """A mapping as the sorted pairs that frozen values hold."""
    return tuple(sorted(values.items()))


def with_fixed(plan: Plan, fixed_s: float) -> Plan:
    """The plan with some seconds more in each step, and in those of all that it is compared with."""

    def longer(pairs: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple((name, seconds + fixed_s) for name, seconds in pairs)

    spread = plan.spread and replace(
        plan.spread,
        mean_s=plan.spread.mean_s + fixed_s,
        p10_s=plan.spread.p10_s + fixed_s,
        p90_s=plan.spread.p90_s + fixed_s,
        baselines_s=longer(plan.spread.baselines_s),
    )
    return replace(
        plan,
        fixed_s=plan.fixed_s + fixed_s,
        step_s=plan.step_s + fixed_s,
        baseline_steps_s=longer(plan.baseline_steps_s),
        alternatives=tuple(replace(o, step_s=o.step_s + fixed_s) if o.fits else o for o in plan.alternatives),
        task_sets=tuple(
            replace(each, step_s=each.step_s + fixed_s, sequential_s=each.sequential_s + fixed_s)
            for each in plan.task_sets
        ),
        spread=spread,
    )
