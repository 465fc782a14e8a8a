"""Stragglers: how long each rank computes in, step by step; sentences that name a rank which is slower than its share.

- Steps come in windows of WINDOW. Of each slice run on each rank the lower quartile of a window counts: what other
  processes of a machine take away in some steps does not.
- A rank is compared with the ranks that run the same layers; one with more samples may take longer by these, while one
  with fewer need not be faster. For layers that it alone runs, and whose batches are of one size, it is compared with
  itself in its best earlier window, and with its share of the plan's prediction.
  What slows all ranks, or what the prediction gets wrong of all, is divided out by the median of the other ranks.
- It is named after PATIENCE windows in a row in which it is slower by the factor that the comparison asks for, and by
  LEAST of a step; again when it has become slower by half. Ranks that cut layers between them wait for each other
  inside of these, so such runs are left out.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spindle.runtime.faults.slowness import (
    BY_ITSELF,
    BY_PEERS,
    BY_PREDICTION,
    FEWEST,
    PATIENCE,
    WINDOW,
    Patience,
    Slow,
    lower_quartile,
)
from spindle.runtime.programs.program import Program, SliceRun
from spindle.values.graph import base_task
from spindle.values.plan import Plan

if TYPE_CHECKING:
    from spindle.runtime.worker import Report

Seconds = Mapping[tuple[int, str], float]
"""Of a rank in a slice run; in one step."""


class Stragglers:
    """Watches the ranks of one program."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.num_ranks = program.num_ranks
        self._runs = {run.name: run for run in program.slices if run.tensor_parallel == 1}
        self._predicted = _predicted(program, plan)
        self._uneven = {size.task for size in plan.sizes if size.least < size.most}
        self._window: dict[tuple[int, str], list[float]] = defaultdict(list)
        self._steps_s: list[float] = []
        self._best: dict[tuple[int, str], float] = {}
        self._patience = Patience()

    def take(self, first_step: int, reports: "Sequence[Report]") -> list[str]:
        """Take in some steps, of which the first is `first_step`; what is to be said of ranks."""
        said: list[str] = []
        for index in range(min(len(report.steps) for report in reports)):
            steps = [report.steps[index] for report in reports]
            self._steps_s.append(max(each.step_s for each in steps))
            for report, each in zip(reports, steps, strict=True):
                for run, seconds in each.busy_s.items():
                    if run in self._runs:
                        self._window[report.rank, run].append(seconds)
            if len(self._steps_s) == WINDOW:
                said += self._judged(first_step + index)
        return said

    def _judged(self, last_step: int) -> list[str]:
        """A window is full."""
        seconds = {key: lower_quartile(held) for key, held in self._window.items() if len(held) >= FEWEST}
        step_s = statistics.median(self._steps_s)
        self._window.clear()
        self._steps_s.clear()
        said = []
        for rank in range(self.num_ranks) if self.num_ranks > 1 else ():
            slow = self._slowness(rank, seconds)
            if self._patience.is_over(rank, slow, step_s) and slow is not None:
                said.append(self._sentence(rank, slow, seconds, step_s, last_step))
        for key, value in seconds.items():
            self._best[key] = min(value, self._best.get(key, value))
        return said

    def _slowness(self, rank: int, seconds: Seconds) -> Slow | None:
        """The comparison in which a rank is too slow, if there is one."""
        for slow, limit in (
            (self._by_peers(rank, seconds), BY_PEERS),
            (self._by_itself(rank, seconds), BY_ITSELF),
            (self._by_prediction(rank, seconds), BY_PREDICTION),
        ):
            if slow is not None and slow.factor > limit:
                return slow
        return None

    def _own(self, rank: int, seconds: Seconds, *, shared: bool) -> dict[str, float]:
        """Runs of a rank that it shares with others; or runs of its own, on batches of one size."""
        held = {run: value for (own, run), value in seconds.items() if own == rank}
        if shared:
            return {name: value for name, value in held.items() if len(self._runs[name].ranks) > 1}
        return {name: value for name, value in held.items() if self._is_alone(self._runs[name])}

    def _is_alone(self, run: SliceRun) -> bool:
        return len(run.ranks) == 1 and not run.varies and base_task(run.task) not in self._uneven

    def _by_peers(self, rank: int, seconds: Seconds) -> Slow | None:
        own, expected, peers = 0.0, 0.0, set[int]()
        for name, value in self._own(rank, seconds, shared=True).items():
            run = self._runs[name]
            took = {
                other: seconds[other, name] * max(1.0, _share(run, rank) / _share(run, other))
                for other in run.ranks
                if other != rank and (other, name) in seconds and _share(run, other)
            }
            if took:
                peers |= took.keys()
                own += value
                expected += statistics.median(took.values())
        if not expected:
            return None
        shown = ", ".join(map(str, sorted(peers)[:4])) + (", .." if len(peers) > 4 else "")
        return Slow(own, expected, f"rank{'s' * (len(peers) > 1)} {shown} for the same layers")

    def _by_itself(self, rank: int, seconds: Seconds) -> Slow | None:
        own = self._own(rank, seconds, shared=False)
        return self._relative(rank, own, seconds, self._best, "it was itself in earlier steps")

    def _by_prediction(self, rank: int, seconds: Seconds) -> Slow | None:
        own = self._own(rank, seconds, shared=False)
        return self._relative(rank, own, seconds, self._predicted, "its share of the prediction")

    def _relative(self, rank: int, own: Mapping[str, float], all_s: Seconds, base: Seconds, than: str) -> Slow | None:
        """What a rank takes beside some base, divided by what the others take beside theirs."""
        now, before = (
            sum(own[run] for run in own if (rank, run) in base),
            sum(base.get((rank, run), 0.0) for run in own),
        )
        sums: dict[int, list[float]] = {}
        for key, value in all_s.items():
            if key[0] != rank and key in base:
                held = sums.setdefault(key[0], [0.0, 0.0])
                held[0] += value
                held[1] += base[key]
        others = [found / based for found, based in sums.values() if based > 0]
        if before <= 0 or not others:
            return None
        expected = before * statistics.median(others)
        return Slow(now, expected, than) if expected else None

    def _sentence(self, rank: int, slow: Slow, seconds: Seconds, step_s: float, last_step: int) -> str:
        busy = [sum(s for (own, _), s in seconds.items() if own == other) for other in range(self.num_ranks)]
        usual_s = max(step_s - slow.excess_s, *busy[:rank], *busy[rank + 1 :])  # others are as busy as they were
        count = self.num_ranks
        first = last_step - PATIENCE * WINDOW + 1
        without_s, slower_s = (usual_s * count / (count - 1 + more) for more in (0.0, 1 / slow.factor))
        took = f"A step takes {step_s:.3g} s, and {usual_s:.3g} s if it were as fast"
        return (
            f"rank {rank} is a straggler in steps {first} to {last_step}: it computes {slow.factor:.1f} times as long "
            f"as {slow.than} ({slow.own_s:.3g} s a step, not {slow.expected_s:.3g} s). {took}; "
            f"planned anew at best {without_s:.3g} s without it, {slower_s:.3g} s "
            "with its speed. See what slows its machine (heat, other processes), or resume with a plan for other "
            "devices"
        )


def _share(run: SliceRun, rank: int) -> float:
    """Samples of a run that a rank holds; where that differs from step to step, all hold as much."""
    low, high = run.bounds_of(rank)
    return 1.0 if run.varies else float(high - low)


def _predicted(program: Program, plan: Plan) -> dict[tuple[int, str], float]:
    """The plan's seconds of each run of one rank: of its slice, by the part of that slice's operators."""
    runs: dict[tuple[str, int], list[SliceRun]] = defaultdict(list)
    for run in program.slices:
        if len(run.ranks) == 1:
            runs[run.metaop, run.ranks[0]].append(run)
    spans: dict[tuple[str, int], float] = defaultdict(float)
    for each in plan.slices:
        if len(each.devices) == 1:
            spans[each.metaop, each.devices[0]] += each.span_s
    found: dict[tuple[int, str], float] = {}
    for (metaop, rank), own in runs.items():
        total = sum(len(run.operators) for run in own)
        for run in own:
            found[rank, run.name] = spans[metaop, rank] * len(run.operators) / total
    return {key: seconds for key, seconds in found.items() if seconds > 0}
