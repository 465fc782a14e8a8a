"""Cost options: how a workload is trained, as far as time and memory depend on it; specs make them.

Choices trade time for memory; `memory_choices` lists their combinations in order of what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from random import Random
from statistics import NormalDist
from typing import Literal

from spindle.errors import WorkloadError
from spindle.values.execution import USUAL, Execution, Parallel

Optimizer = Literal[
    "adamw", "adam", "adamw_8bit", "adafactor", "lion", "muon", "sgd", "sgd_momentum", "shampoo"
]  # `spindle.cost.optimizers` says what each keeps and computes


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """What `spindle.cost.metaops` needs to know besides the MetaGraph.

    optimizer          decides the states kept for each trained parameter
    shard_optimizer    master copies and states are divided over the data-parallel devices (ZeRO stage 1)
    shard_parameters   components whose parameters, gradients and states are divided over all devices, a part of every
                       layer on each (ZeRO stage 3)
    never_sharded      components of which a plan must not do so by itself
    recompute          a layer keeps its input only and runs forward again in backward
    recomputed         components of which this holds when it does not hold of all
    tensor_parallel, min_tensor_parallel   degrees allowed in a spec; a captured component has its own. A high least
                       degree saves memory: each device then holds a share of every layer
    execution          how its layers, attention, optimizer and reductions are run
    layout             how it is run today, to be compared with
    degrees            (component, degrees allowed, rising) where components differ; those not named have degree 1
    may_offload        optimizer states may be kept in the memory of the host where nothing else fits
    offload_optimizer  master copies and states are kept there, and the host runs the optimizer's step
    master_weights     sixteen-bit parameters have a master copy of four bytes, and states as wide as it
    wide_gradients     their gradients stay in four bytes until the step, as this runtime sums them; else they have two
    averages           a running average of the weights is kept, in four bytes or as wide as they are
    length_spread      (task, component, standard deviation over mean of its samples' lengths)
    """

    optimizer: Optimizer = "adamw"
    shard_optimizer: bool = False
    shard_parameters: tuple[str, ...] = ()
    never_sharded: tuple[str, ...] = ()
    recompute: bool = False
    recomputed: tuple[str, ...] = ()
    tensor_parallel: int = 1
    min_tensor_parallel: int = 1
    execution: Execution = USUAL
    layout: Parallel | None = None
    degrees: tuple[tuple[str, tuple[int, ...]], ...] = ()
    may_offload: bool = False
    offload_optimizer: bool = False
    master_weights: bool = True
    wide_gradients: bool = False
    averages: bool = False
    length_spread: tuple[tuple[str, str, float], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.min_tensor_parallel <= self.tensor_parallel:
            raise WorkloadError(
                f"tensor_parallel goes from {self.min_tensor_parallel} to {self.tensor_parallel}; "
                "give degrees of at least one, the least first"
            )
        for task, component, spread in self.length_spread:
            if not 0 <= spread < float("inf"):
                raise WorkloadError(f"{task}.{component}: length spread is {spread!r}; it must be zero or more")

    def of(self, component: str) -> "CostOptions":
        """The same for one component alone."""
        recompute = self.recompute or component in self.recomputed
        if not self.degrees:
            return replace(self, recompute=recompute)
        own = dict(self.degrees).get(component, (1,))
        least = min(self.min_tensor_parallel, own[-1])
        return replace(
            self,
            recompute=recompute,
            tensor_parallel=own[-1],
            min_tensor_parallel=least,
            degrees=((component, own),),
        )

    def degrees_within(self, devices_per_node: int) -> tuple[int, ...]:
        """Degrees that a spec's component, whose options these are, may have in a node of that number of devices.

        Those from the least one up; where the component has none of these, its largest.
        """
        allowed = self.degrees[0][1] if self.degrees else range(self.min_tensor_parallel, self.tensor_parallel + 1)
        usable = tuple(degree for degree in allowed if devices_per_node % degree == 0)
        high = tuple(degree for degree in usable if degree >= self.min_tensor_parallel)
        return high or (usable[-1:] if self.degrees else ())

    def spread_of(self, task: str, component: str) -> float:
        """Spread of the lengths of a component's samples in a task; 0 when all are equal."""
        found = (spread for t, c, spread in self.length_spread if (t, c) == (task, component))
        return next(found, 0.0)


def memory_choices(cost_options: CostOptions) -> tuple[CostOptions, ...]:
    """The same options with less and less memory, cheapest first.

    As given, optimizer states sharded, layers recomputed, both. Where layers may be spread over several devices (tensor
    parallelism), then the same with a least degree of 2, 4, ..; where states may be offloaded, at last that as well.
    """
    both = ((False, False), (True, False), (False, True), (True, True))
    top = cost_options.tensor_parallel if cost_options.degrees else cost_options.min_tensor_parallel
    floors = [cost_options.min_tensor_parallel]
    while 2 * floors[-1] <= top:
        floors.append(2 * floors[-1])
    options = [(floor, *option, False) for floor in floors for option in (both if floor == floors[0] else both[1::2])]
    if cost_options.may_offload:
        options += [(floors[0], True, recompute, True) for recompute in (False, True)]
    found: list[CostOptions] = []
    for floor, shard, recompute, offload in options:
        choice = replace(
            cost_options,
            min_tensor_parallel=floor,
            shard_optimizer=cost_options.shard_optimizer or shard,
            recompute=cost_options.recompute or recompute,
            offload_optimizer=cost_options.offload_optimizer or offload,
        )
        if choice not in found:
            found.append(choice)
    return tuple(found)


def sharded_choices(cost_options: CostOptions, components: Sequence[str]) -> tuple[CostOptions, ...]:
    """The same options with parameters of more and more `components` sharded, each without and with layers recomputed;
    the other components' states are sharded too.
    """
    return tuple(
        replace(
            cost_options,
            shard_optimizer=True,
            shard_parameters=tuple(sorted((*cost_options.shard_parameters, *components[:count]))),
            recompute=recompute,
        )
        for count in range(1, len(components) + 1)
        for recompute in ((True,) if cost_options.recompute else (False, True))
    )


def length_spread(mean: float, p99: float) -> float:
    """Standard deviation over mean of log-normal lengths with this mean and 99th percentile.

    p99 / mean = exp(2.326 s - s^2 / 2) for the log's deviation s; beyond exp(2.326^2 / 2) = 15 no log-normal has it.

    >>> round(length_spread(512, 2048), 2)
    0.84
    """
    z = NormalDist().inv_cdf(0.99)
    ratio = log(p99 / mean)
    if not 0 <= ratio <= z * z / 2:
        raise WorkloadError(
            f"a mean of {mean:g} and a 99th percentile of {p99:g} tokens fit no log-normal lengths; "
            f"give a percentile between the mean and {exp(z * z / 2):.0f} times the mean"
        )
    sigma = z - sqrt(z * z - 2 * ratio)
    return sqrt(exp(sigma * sigma) - 1)


def log_normal_lengths(mean: float, p99: float, count: int, source: Random) -> list[float]:
    """Lengths of samples, log-normal with this mean and 99th percentile."""
    sigma = sqrt(log(1 + length_spread(mean, p99) ** 2))
    return [mean * exp(sigma * source.gauss(0.0, 1.0) - sigma * sigma / 2) for _ in range(count)]


def imbalance(spread: float, samples_per_device: float, devices: int) -> float:
    """Longest local batch over the mean one: what unequal lengths cost a data-parallel layer, on average.

    Local sums of b lengths spread by spread / sqrt(b); the largest of n of them lies at Blom's score of n normals.
    """
    if devices < 2 or not spread:
        return 1.0
    score = NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
    return 1.0 + spread / sqrt(samples_per_device) * score


def tail(spread: float, samples_per_device: float) -> float:
    """99th percentile of a local batch's length over its mean: what memory must hold."""
    return 1.0 + NormalDist().inv_cdf(0.99) * spread / sqrt(samples_per_device)
