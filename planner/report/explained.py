"""Explained: an Explanation in, sentences and tables for people out, at most 100 columns wide."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from spindle.planner.report.explain import Explanation, MetaOpReason
from spindle.planner.report.figures import WIDTH, clip, seconds
from spindle.values.turns import turns_in_words

MOST_CRITICAL = 6


def render_explanation(found: Explanation) -> str:
    """The explanation as text within 100 columns."""
    parts = (_bound_lines(found), _gap_lines(found), _metaop_lines(found.metaops), _idle_lines(found))
    return "\n\n".join("\n".join(part) for part in parts)


def _sentences(*texts: str) -> list[str]:
    return wrap(" ".join(texts), WIDTH, break_long_words=False, break_on_hyphens=False)


def _bound_lines(found: Explanation) -> Iterator[str]:
    over = found.makespan_s / found.lower_bound_s - 1 if found.lower_bound_s else 0.0
    if found.turns:
        yield from _sentences(turns_in_words(found.turns))
    yield from _sentences(
        f"Forward and backward take {seconds(found.makespan_s)} (the makespan).",
        f"No schedule of these layers on these devices takes less than {seconds(found.lower_bound_s)} (the bound),",
        f"so a better schedule could save at most {100 * over / (1 + over):.2f} % of it.",
    )
    yield ""
    yield from _sentences(
        f"What sets the bound: {100 * found.device_share:.0f} % is device time, which more devices shorten;",
        f"{100 * (1 - found.device_share):.0f} % is chains of MetaOps that wait for each other, which more devices",
        "shorten only as far as each MetaOp gets faster on them.",
    )
    for share, names in found.chains:
        yield clip(f"  {100 * share:>4.1f} %  {' > '.join(names)}")
    yield ""
    yield from _sentences(_critical(found))
    for name in found.critical[-MOST_CRITICAL:]:
        yield clip(f"  {name}")


def _critical(found: Explanation) -> str:
    number = len(found.critical)
    last = f"; the last {MOST_CRITICAL} of them" if number > MOST_CRITICAL else ""
    what = "1 slice, which takes" if number == 1 else f"{number} slices, each of which waits for the one before, take"
    return f"The critical path: {what} the whole makespan (name[first layer:end] x devices){last}:"


def _gap_lines(found: Explanation) -> Iterator[str]:
    gap_s = found.makespan_s - found.priced_bound_s
    yield f"{'Where the gap to the bound comes from':40} {'ms':>12} {'% of bound':>11}"
    for name, part_s in (*found.gap_s, ("together", gap_s)):
        yield f"  {name:38} {1e3 * part_s:>12.3f} {100 * part_s / found.priced_bound_s:>11.2f}"
    if found.lower_bound_s > found.priced_bound_s * (1 + 1e-6):
        rest_s = found.lower_bound_s - found.priced_bound_s
        how = "a bound that looks at each moment" if found.over_time else "the plan itself"
        yield from _sentences(
            f"Of that, no schedule can save {1e3 * rest_s:.3f} ms: the table counts from a simpler bound of",
            f"{seconds(found.priced_bound_s)}, and {how} proves the rest.",
        )


def _metaop_lines(metaops: Sequence[MetaOpReason]) -> Iterator[str]:
    names = min(36, max(len("MetaOp"), *(len(m.name) for m in metaops)))
    yield from _sentences(
        "Why each MetaOp has its devices. `cheapest` is the number of devices that costs least by the bound; `lost` is",
        "what other numbers add to the makespan.",
    )
    yield f"  {'MetaOp':{names}} {'layers x devices':20} {'cheapest':>8} {'lost ms':>8}  why"
    for m in sorted(metaops, key=lambda m: (-m.lost_s, m.start_s, m.name)):
        counts = clip(" + ".join(f"{layers}x{n}" for n, layers in m.counts), 20)
        row = f"  {clip(m.name, names):{names}} {counts:20} {m.cheapest:>8} {1e3 * m.lost_s:>8.3f}  {m.reason}"
        yield clip(row)


def _idle_lines(found: Explanation) -> Iterator[str]:
    idle_s = sum(part_s for _, part_s in found.idle_s)
    where = ", ".join(f"{part_s:.3g} {name}" for name, part_s in found.idle_s if part_s > 0)
    if not where:
        yield "No device idles."
        return
    yield from _sentences(f"Devices idle for {idle_s:.3g} device-seconds together: {where}.")
    if not found.windows:
        return
    yield f"  {'device-s':>10}  {'from s':>10} {'to s':>10} {'devices':>7}  until"
    for w in found.windows:
        yield clip(f"  {w.device_s:>10.6f}  {w.start_s:>10.6f} {w.end_s:>10.6f} {w.devices:>7}  {w.until}")
