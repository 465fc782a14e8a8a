"""Chrome traces: the schema that Perfetto reads, names of the program, arrows from end to end."""

import json
from collections import Counter
from typing import Any

import pytest

from spindle.errors import InputError
from spindle.planner.simulate import simulate
from spindle.timeline import chrome_trace
from spindle.values.trace import Trace
from tests.timeline.timeline_samples import by_hand, made_up_run, planned

REQUIRED = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "M": {"name", "pid", "tid", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def events(value: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(json.dumps(value))["traceEvents"]
    return found


def test_every_event_has_what_its_phase_needs() -> None:
    plan, predicted = planned(4)
    for trace in (predicted, made_up_run(plan, predicted)):
        for event in events(chrome_trace(trace, plan=plan)):
            assert REQUIRED[event["ph"]] <= event.keys()
            assert event.get("dur", 0.0) >= 0
            assert isinstance(event["pid"], int)


def test_a_process_is_a_rank_and_its_threads_are_compute_and_communication() -> None:
    plan, predicted = planned(2)
    run = made_up_run(plan, predicted)
    found = events(chrome_trace(run))
    names = {(e["pid"], e["name"], e["args"].get("name")) for e in found if e["ph"] == "M"}
    assert {(rank, "process_name", f"rank {rank}") for rank in (0, 1)} <= names
    assert {(0, "thread_name", "compute"), (0, "thread_name", "communication")} <= names
    threads = {e["name"].split()[0]: e["tid"] for e in found if e["ph"] == "X"}
    assert threads == {"LOAD": 0, "FORWARD": 0, "BACKWARD": 0, "STEP": 0, "TRANSFER": 1, "AWAIT": 1, "REDUCE": 1}


def test_every_span_of_every_step_is_there_at_its_time() -> None:
    plan, predicted = planned(2)
    run = made_up_run(plan, predicted)
    found = sorted((e["pid"], e["name"], round(e["ts"], 3)) for e in events(chrome_trace(run)) if e["ph"] == "X")
    assert found == sorted((s.rank, s.name, round(s.start_s * 1e6, 3)) for s in run)


def test_arrows_lead_from_compute_to_the_wait_for_it() -> None:
    plan = by_hand()
    found = events(chrome_trace(simulate(plan), plan=plan))
    spans = [e for e in found if e["ph"] == "X"]
    arrows: dict[int, dict[str, dict[str, Any]]] = {}
    for event in found:
        if event["ph"] in "sf":
            arrows.setdefault(event["id"], {})[event["ph"]] = event
    assert arrows
    for ends in arrows.values():
        assert ends.keys() == {"s", "f"}
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        for end in ends.values():
            inside = [
                s
                for s in spans
                if (s["pid"], s["tid"]) == (end["pid"], end["tid"]) and s["ts"] <= end["ts"] <= s["ts"] + s["dur"]
            ]
            assert inside, end


def test_a_run_has_arrows_without_its_plan() -> None:
    plan, predicted = planned(4)
    run = made_up_run(plan, predicted, steps=2)
    kinds = Counter(event["ph"] for event in events(chrome_trace(run)))
    waits = sum(span.name.startswith("AWAIT") for span in run)
    assert kinds["s"] == kinds["f"] >= waits > 0


def test_arguments_say_what_the_plan_thought() -> None:
    plan, predicted = planned(2)
    found = events(chrome_trace(made_up_run(plan, predicted), plan=plan))
    forward = next(e for e in found if e["name"].startswith("FORWARD"))
    assert forward["args"].keys() >= {"task", "component", "metaop", "wave", "planned_s", "step"}


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(InputError, match="no spans"):
        chrome_trace(Trace(num_ranks=1, source="measured"))
