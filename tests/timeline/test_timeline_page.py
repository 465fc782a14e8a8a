"""The page: valid, closed to the world, safe with hostile names, and with every span in it."""

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spindle.errors import InputError
from spindle.planner.simulate import simulate
from spindle.timeline import render_page, timeline_figures
from spindle.timeline.page.html import embedded
from spindle.values.plan import Memory, make_waves
from spindle.values.trace import Span, SpanKind, Trace
from tests.timeline.timeline_html import Page, outside_references
from tests.timeline.timeline_samples import GIB, by_hand, made_up_run, planned

GOLDEN = Path(__file__).parent.parent / "golden"
HOSTILE = "</script><img src=x onerror=alert(1)>'\"&amp;<!--<script>\u2028]]>"
SOURCES = ("both", "predicted", "measured", "neither")


def page_of(what: str, num_devices: int = 4) -> str:
    plan, predicted = planned(num_devices)
    run = made_up_run(plan, predicted)
    return render_page(
        plan,
        predicted=predicted if what in ("both", "predicted") else None,
        measured=run if what in ("both", "measured") else None,
        title="two tasks",
    )


@pytest.mark.parametrize("what", SOURCES)
def test_it_is_valid_and_needs_nothing_else(what: str) -> None:
    text = page_of(what)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert outside_references(text) == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any("style" in attributes for _, attributes in page.elements)


def test_the_page_runs_no_script_and_no_style_but_its_own() -> None:
    page = Page(page_of("both"))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    for kind, text in (("script", page.scripts[1]), ("style", page.styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_hostile_names_stay_text() -> None:
    """Names of tasks and components, and the title, with every way out of a script, a comment or an attribute."""
    plan, predicted = planned(2, prefix=HOSTILE)
    run = made_up_run(plan, predicted, steps=1)
    text = render_page(plan, predicted=predicted, measured=run, title=HOSTILE)
    page = Page(text)
    assert not {"img", "iframe"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert HOSTILE + "clip" in page.data["tasks"]
    assert page.texts.count(HOSTILE) >= 2  # title and heading
    assert any(HOSTILE + "clip" in text for text in page.texts)


def test_embedded_json_cannot_leave_its_element() -> None:
    text = embedded({"name": HOSTILE})
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == {"name": HOSTILE}


@pytest.mark.parametrize("num_devices", [2, 8])
def test_every_span_is_there(num_devices: int) -> None:
    plan, predicted = planned(num_devices)
    run = made_up_run(plan, predicted)
    data = Page(render_page(plan, predicted=predicted, measured=run)).data
    for view, trace in zip(data["views"], (predicted, run), strict=True):
        assert len(view["steps"]) == trace.num_steps
        for step in view["steps"]:
            first_s = min(s.start_s for s in trace if s.step == step["step"])
            for rank, flat in enumerate(step["rows"]):
                expected = [s for s in trace if (s.rank, s.step) == (rank, step["step"])]
                found = list(items(flat, view, data))
                assert [name for name, _, _ in found] == [s.name for s in sorted(expected, key=lambda s: s.start_s)]
                for (_, start_s, end_s), span in zip(found, sorted(expected, key=lambda s: s.start_s), strict=True):
                    assert start_s == pytest.approx(span.start_s - first_s, abs=data["tick_s"])
                    assert end_s == pytest.approx(span.end_s - first_s, abs=data["tick_s"])


def items(
    flat: list[int], view: dict[str, list[list[int]]], data: dict[str, list[str]]
) -> list[tuple[str, float, float]]:
    """Name, start and end of all that is not idle time."""
    found, at, tick_s = [], 0, float(data["tick_s"])  # type: ignore[arg-type]
    for what, gap, ticks in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        start, at = at + gap, at + gap + ticks
        fields = view["whats"][what]
        if data["kinds"][fields[0]] != "idle":
            found.append((data["strings"][fields[1]], start * tick_s, at * tick_s))
    return found


def test_accounts_and_memory_are_there_for_every_device_and_step() -> None:
    data = Page(page_of("both", 8)).data
    for view in data["views"]:
        for step in view["steps"]:
            assert len(step["rows"]) == len(step["accounts"]) == len(step["memory"]) == 8
            assert all(abs(sum(row) - step["ticks"]) < 20 for row in step["accounts"])


def test_golden_data_of_a_small_page() -> None:
    """Run with UPDATE_GOLDEN=1 to write it anew, then read the difference."""
    plan = by_hand()
    data = Page(render_page(plan, predicted=simulate(plan), measured=small_run())).data
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n"
    path = GOLDEN / "timeline-small.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def small_run() -> Trace:
    """The plan of `by_hand`, run: device 1 waits, both reduce, device 0 comes last."""
    rows = (
        (0, SpanKind.LOAD, "LOAD t", 0.0, 0.25, ""),
        (0, SpanKind.FORWARD, "FORWARD s0", 0.25, 1.5, "t.a"),
        (0, SpanKind.TRANSFER, "TRANSFER s0>s1", 1.5, 1.625, "t.b"),
        (1, SpanKind.TRANSFER, "AWAIT s0>s1", 0.0, 2.0, "t.b"),
        (0, SpanKind.FORWARD, "FORWARD s1", 1.625, 2.125, "t.b"),
        (1, SpanKind.FORWARD, "FORWARD s1", 2.0, 2.75, "t.b"),
        (1, SpanKind.BACKWARD, "BACKWARD s1", 2.75, 3.75, "t.b"),
        (0, SpanKind.BACKWARD, "BACKWARD s1", 2.125, 3.125, "t.b"),
        (0, SpanKind.BACKWARD, "BACKWARD s0", 3.125, 5.125, "t.a"),
        (1, SpanKind.REDUCE, "REDUCE b0", 3.75, 5.5, ""),
        (0, SpanKind.REDUCE, "REDUCE b0", 5.125, 5.5, ""),
        (0, SpanKind.STEP, "STEP", 5.5, 5.75, ""),
        (1, SpanKind.STEP, "STEP", 5.5, 5.75, ""),
    )
    spans = (
        Span(
            rank=rank,
            kind=kind,
            name=name,
            start_s=start_s,
            end_s=end_s,
            task="t" if metaop or kind is SpanKind.LOAD else "",
            component=metaop[2:],
            metaop=metaop,
            wave={"t.a": 0, "t.b": 1}.get(metaop, -1),
            num_bytes=2 if kind is SpanKind.TRANSFER else 8 if kind is SpanKind.REDUCE else 0,
        )
        for rank, kind, name, start_s, end_s, metaop in rows
    )
    return Trace(num_ranks=2, source="measured", spans=tuple(spans))


# -- what the page says without its script ---------------------------------------------------------------------------


def test_the_summary_says_what_matters() -> None:
    plan, predicted = planned(8)
    run = made_up_run(plan, predicted)
    text = Page(render_page(plan, predicted=predicted, measured=run)).text
    median_s = sorted(run.step_s(step) for step in range(3))[1]
    for words in (
        "paper plan",
        "8 devices (1 node of 8 toy)",
        "5 MetaOps of 2 tasks",
        f"{len(plan.waves)} waves",
        f"Step, measured {median_s * 1e3:.4g} ms",
        f"predicted {predicted.step_s() * 1e3:.4g} ms (+",
        "median of 3",
        "above the best possible: bound",
        "steps than with the best baseline",
        "of device time in the measured step; predicted",
        "GiB of 80 GiB on device",
        "devices split by task",
        "waits for a result not made yet",
    ):
        assert words in text, words


def test_it_says_when_waves_gain_nothing() -> None:
    plan, _ = planned(2)
    usual = (("sequential", plan.step_s),)
    assert "Waves gain nothing here: sequential is as fast." in render_page(replace(plan, baseline_steps_s=usual))
    slower = replace(plan, baseline_steps_s=(("task_split", plan.step_s / 2),))
    assert "This plan is slower than task_split; method auto never is." in render_page(slower)
    assert "Loss" in Page(render_page(slower)).text


def test_it_says_when_the_plan_does_not_fit() -> None:
    plan, _ = planned(2)
    heavy = replace(plan, memory=Memory(peak_bytes_per_device=(1e11, 2e11), fits=False))
    assert "186 GiB does not fit ; of 80 GiB on device 1" in Page(render_page(heavy)).text


def test_measured_memory_stands_beside_planned() -> None:
    """Device by device where the trace holds it; a run on CPUs says that it has none."""
    plan, predicted = planned(2)
    run = made_up_run(plan, predicted)
    text = Page(render_page(plan, predicted=predicted, measured=run)).text
    assert "not measured by this run; only runs on GPUs measure it" in text
    assert "Peak memory" not in text
    plan = replace(plan, memory=Memory(peak_bytes_per_device=(2.0 * GIB, 4.0 * GIB), fits=True))
    run = replace(run, peak_bytes=(3 * 2**30, 2 * 2**30))
    text = Page(render_page(plan, measured=run)).text
    assert "measured 3 GiB on device 0" in text
    assert "device planned measured off by 0 2 GiB 3 GiB +50.0 % 1 4 GiB 2 GiB -50.0 %" in text
    (view,) = timeline_figures(plan, measured=run)["views"]
    assert [device["measured_peak_bytes"] for device in view["devices"]] == [3 * 2**30, 2 * 2**30]


def test_of_many_devices_the_fullest_are_listed() -> None:
    plan, predicted = planned(64)
    run = replace(made_up_run(plan, predicted, steps=1), peak_bytes=tuple(range(2**30, 2**30 + 64)))
    text = Page(render_page(plan, measured=run)).text
    assert "The 16 devices of 64 that held most are listed." in text


def test_a_bare_plan_is_enough() -> None:
    """Neither MetaGraph nor cluster, bound, baselines or memory."""
    plan = replace(by_hand(), metagraph=None, cluster=None)
    page = Page(render_page(plan))
    assert "no bound is known" in page.text
    assert page.data["components"] == ["a", "b"]
    assert page.data["tasks"] == ["t"]


@pytest.mark.parametrize("what", ["predicted", "measured"])
def test_a_trace_of_another_plan_is_refused(what: str) -> None:
    plan, predicted = planned(4)
    strange = planned(2)[1]
    with pytest.raises(InputError, match=f"the {what} trace has 2 ranks but the plan 4 devices"):
        render_page(plan, predicted=strange if what == "predicted" else predicted, measured=strange)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_strange_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold is"):
        render_page(planned(2)[0], threshold=threshold)


def test_names_stand_in_the_order_of_the_alphabet_and_of_numbers() -> None:
    """So that colors do not depend on the plan."""
    slices = by_hand().slices
    named = [replace(slices[0], metaop=f"t{i}.block{i}") for i in (10, 9, 1)]
    plan = replace(by_hand(), metagraph=None, cluster=None, waves=make_waves(named))
    assert Page(render_page(plan)).data["components"] == ["block1", "block9", "block10"]
    assert Page(render_page(plan)).data["tasks"] == ["t1", "t9", "t10"]


def test_the_same_input_gives_the_same_page() -> None:
    assert page_of("both") == page_of("both")
