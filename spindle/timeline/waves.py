"""Waves on the timeline: a step in, when each wave ran forward and backward and how that compares with the plan out.

A wave's seconds are those of its longest slice on its slowest device: slices of one wave need not start together when
measured, so first start to last end would blame the wave for what came before it. A miss counts when it is beyond the
threshold and more than `LEAST_MISS` of the step: a slice of microseconds is noise.

No barrier stands between waves, so a wave may begin after one that the plan has behind it. On the strips numbers rise
through forward and fall through backward all the same: such a wave has no place of its own there.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spindle.timeline.items import COMPUTE_KINDS, Kind, StepView
from spindle.values.plan import Plan

LEAST_MISS = 1e-3


class WaveTime(NamedTuple):
    """One wave in one direction.

    start_s, end_s   from its first start to its last end
    seconds          of its longest slice on the slowest device
    planned_s        of its longest slice as planned; 0 when the plan says nothing
    miss             seconds / planned_s - 1 when that counts, else 0
    """

    wave: int
    kind: Kind
    start_s: float
    end_s: float
    seconds: float
    planned_s: float
    miss: float


def wave_times(view: StepView, *, threshold: float) -> tuple[WaveTime, ...]:
    """Waves of a step in order of start, forward and backward apart; `threshold` 0.2 allows 20 % either way."""
    found: dict[tuple[int, Kind], list[tuple[float, float, float]]] = {}
    for row in view.rows:
        for item in row:
            if item.what.kind in COMPUTE_KINDS and item.what.wave >= 0:
                times = (item.start_s, item.end_s, item.what.planned_s)
                found.setdefault((item.what.wave, item.what.kind), []).append(times)
    least_s = LEAST_MISS * view.step_s
    waves = (_wave_time(wave, kind, times, threshold, least_s) for (wave, kind), times in found.items())
    return tuple(sorted(waves, key=lambda w: (w.start_s, w.wave)))


def turn_by_wave(plan: Plan) -> dict[int, int]:
    """The turn of each wave; tasks run in turns, forward and backward, where that saves memory. Without turns all 0."""
    if plan.metagraph is None:
        return {}
    turns, metagraph = plan.turn_by_task, plan.metagraph
    return {wave.index: max(turns.get(metagraph[s.metaop].task, 0) for s in wave.slices) for wave in plan.waves}


def leading(waves: Sequence[WaveTime], turns: Mapping[int, int]) -> tuple[bool, ...]:
    """Whether each wave (in order of start) begins before all that the plan has behind it: turn after turn, forward by
    rising number, then backward by falling number.
    """
    found, furthest = [], (-1, False, 0)
    for wave in waves:
        backward = wave.kind is Kind.BACKWARD
        place = (turns.get(wave.wave, 0), backward, -wave.wave if backward else wave.wave)
        found.append(place > furthest)
        furthest = max(furthest, place)
    return tuple(found)


def _wave_time(
    wave: int, kind: Kind, times: Sequence[tuple[float, float, float]], threshold: float, least_s: float
) -> WaveTime:
    seconds = max(end_s - start_s for start_s, end_s, _ in times)
    planned_s = max(planned for _, _, planned in times)
    miss = seconds / planned_s - 1 if planned_s > 0 else 0.0
    return WaveTime(
        wave=wave,
        kind=kind,
        start_s=min(start_s for start_s, _, _ in times),
        end_s=max(end_s for _, end_s, _ in times),
        seconds=seconds,
        planned_s=planned_s,
        miss=miss if abs(miss) > threshold and abs(seconds - planned_s) > least_s else 0.0,
    )
