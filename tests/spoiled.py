"""Spoiled files: valid ones of every format, changed by their structure (a value of another kind or size, a key less or
twice, parts put elsewhere) and by their bytes; commands that read them, and the rules that each end keeps.

Each ends within its time with exit code 0 to 3; refusals are one to three lines, and nothing that is printed holds a
control character.
"""

import contextlib
import copy
import csv
import io
import json
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from spindle.cli import main as spindle
from spindle.formats import read, write
from spindle.harmless import harmless
from spindle.plan import Plan
from spindle.planner.simulate import simulate

LIMIT_S = 30  # of the processor, since other work must not make a test fail
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**53 + 1, 2**64, 10**400, -(10**9), 0.0, -0.0, 0.5, -0.5,
    1e-320, 1e-18, 1e-9, 1e9, 1e18, 1e308, -1e308, float("nan"), float("inf"), "", "a", "1", "01", "-1", "nan",
    "\x1b[31mred\x1b[0m", "\x9b2J", "\u202eleft", "\x00", "a\nb", "x" * 20_000, "\ud800", "é\u200d", "'", "../..",
    [], {}, [[]], {"a": 1}, [1, 2], [0] * 1000,
]  # fmt: skip
SPEC = """\
format: spindle.workload
version: 1
name: small
components:
  eye: {layers: 2, hidden: 64, heads: 2, tokens: 16, output_tokens: 1, output_features: 32}
  ear: {layers: 3, hidden: 32, heads: 2, tokens: 8, output_tokens: 1, output_features: 32, tokens_p99: 12}
  lm: {kind: transformer, layers: 2, hidden: 64, heads: 2, tokens: 8, vocab: 100, trained: lora, lora_rank: 2}
  head: {kind: mlp, widths: [64, 32, 8]}
tasks:
  match: {batch_size: 8, flow: [[eye, ear]], loss: contrastive, probability: 0.5}
  tell: {batch_size: 4, flow: [eye, lm, head], loss: other, every: 2, tokens: {lm: 12}}
"""
CLUSTER = """\
nodes: 2
devices_per_node: 2
device: {name: own, memory_gib: 80, peak_tflops: 312, memory_bandwidth_gbps: 2039, reserved_gib: 4}
intra_node: {bandwidth_gbps: 300, latency_us: 6}
inter_node: {bandwidth_gbps: 25, latency_us: 15, node_bandwidth_gbps: 50}
"""
STEPS = "gpus,per_gpu_batch,seconds_per_step,table\n1,12,0.11,a\n2,12,0.12,a\n2,24,0.2,a\n"

Commands = dict[str, list[tuple[str, ...]]]
COMMANDS: Commands = {
    "spec.yaml": [("plan", "FILE", "-c", "1x2", "--time-limit", "0.1"), ("whatif", "FILE", "--devices", "1,2",
                   "--time-limit", "0.1")],
    "cluster.yaml": [("plan", "spec.yaml", "-c", "FILE", "--time-limit", "0.1")],
    "graph.json": [("plan", "FILE", "-c", "1x2", "--time-limit", "0.1"), ("check", "plan.json", "-g", "FILE")],
    "plan.json": [("check", "FILE"), ("explain", "FILE"), ("show", "FILE"), ("show", "FILE", "--json"),
                  ("show", "FILE", "--svg", "out.svg"), ("diff", "FILE", "plan.json"), ("diff", "plan.json", "FILE"),
                  ("plan", "spec.yaml", "-c", "1x2", "--start", "FILE", "--time-limit", "0.1"),
                  ("export-plan", "FILE", "--format", "megatron", "--language", "lm", "-o", "out.json")],
    "trace.json": [("show", "plan.json", "--trace", "FILE"), ("show", "plan.json", "--trace", "FILE", "--json"),
                   ("show", "plan.json", "--trace", "FILE", "--html", "out.html"),
                   ("show", "plan.json", "--trace", "FILE", "--chrome", "out.json")],
    "profile.json": [("plan", "spec.yaml", "-c", "1x2", "-p", "FILE", "--time-limit", "0.1")],
    "calibration.json": [("plan", "spec.yaml", "-c", "1x2", "--calibration", "FILE", "--time-limit", "0.1")],
    "steps.csv": [("calibrate", "spec.yaml", "-c", "1x4", "--steps", "FILE", "-o", "out.json")],
}  # fmt: skip


class Hang(BaseException):
    """A command did not end in time."""


def _late(_: int, __: FrameType | None) -> None:
    raise Hang


def run(*arguments: str) -> tuple[int, str, str]:
    """A command in this process: its exit code, what it printed, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(10 * LIMIT_S)
    sys.argv = ["spindle", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            spindle()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 99
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return code, out.getvalue(), err.getvalue()


def wrong(code: int, out: str, err: str) -> str:
    """Which rule an end breaks, or ""."""
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    said = [line for line in err.splitlines() if not line.startswith("spindle: warning:")]
    if code in (2, 3) and not 1 <= len(said) <= 3:
        return f"{len(said)} lines"
    if any(len(line) > 99 for line in said):
        return "a line of 100 columns or more"
    if code in (2, 3) and (len(err) > 2000 or "Traceback" in err):
        return f"{len(err)} characters"
    if harmless(out + err) != out + err:
        return "control characters"
    return ""


# -- samples and how they are spoiled ---------------------------------------------------------------------------------


def prepare() -> None:
    """Valid files of every format, in this folder."""
    Path("spec.yaml").write_text(SPEC)
    Path("cluster.yaml").write_text(CLUSTER)
    Path("steps.csv").write_text(STEPS)
    for arguments in (
        ("plan", "spec.yaml", "-c", "1x2", "-o", "plan.json", "--time-limit", "0.5"),
        ("calibrate", "spec.yaml", "-c", "1x4", "--steps", "steps.csv", "-o", "calibration.json"),
    ):
        code, _, err = run(*arguments)
        assert code == 0, err
    plan = json.loads(Path("plan.json").read_text())
    Path("graph.json").write_text(json.dumps(plan["metagraph"]))
    write(simulate(read("plan.json", Plan)), "trace.json")
    entry = {"num_devices": 1, "forward_s": 1e-4, "backward_s": 2e-4, "peak_bytes": 1e6}
    entries = [{"kind": name, **entry} for name in ("eye.blocks", "lm.blocks")]
    links = [{"operation": "all_reduce", "level": "intra_node", "members": 2, "num_bytes": n, "seconds": n * 1e-9}
             for n in (1000, 10**6)]  # fmt: skip
    loads = [{"task": "match", "batch_size": 8, "seconds": 0.01}]
    profile = {
        "format": "spindle.profile",
        "version": 1,
        "device": "own",
        "entries": entries,
        "links": links,
        "loads": loads,
    }
    Path("profile.json").write_text(json.dumps(profile))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all parts of a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def spoiled(value: Any, draw: random.Random) -> Any:
    """The value with one change of its structure."""
    every = [path for path in places(value) if path]
    if not every:
        return draw.choice(VALUES)
    path = draw.choice(every)
    holder, key = at(value, path[:-1]), path[-1]
    kind = draw.randrange(7)
    if kind <= 2:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = copy.deepcopy(at(value, draw.choice(every)))
    elif kind == 5 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * draw.choice((-1, 0.5, 2, 10, 1000, 1e-6, 1e6, 1e12))
        if draw.random() < 0.5:
            with contextlib.suppress(OverflowError):
                holder[key] = int(holder[key])
    elif isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[draw.choice(("x", str(key) + "x", "\x1b[2J", "2", "0"))] = copy.deepcopy(holder[key])
    return value


def spoiled_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one change."""
    place, kind = draw.randrange(len(data) + 1), draw.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return (
            data[:place]
            + draw.choice((b"\x1b[31m", b"\xff\xfe", b"{", b"[" * 200, b"9" * 5000, b"&a *a", b"- "))
            + data[place:]
        )
    other = draw.randrange(len(data) + 1)
    return data[:place] + data[min(place, other) : max(place, other)] + data[place:]


@dataclass(frozen=True)
class Case:
    """A spoiled file, and the command that reads it."""

    name: str
    data: bytes
    command: tuple[str, ...]

    def verdict(self) -> tuple[int, str]:
        """Run the command, in the folder of the samples: its exit code, and which rule it breaks, or ""."""
        file = Path(f"spoiled{Path(self.name).suffix}")
        file.write_bytes(self.data)
        try:
            code, out, err = run(*(str(file) if part == "FILE" else part for part in self.command))
        except Hang:
            return -1, f"not through in {LIMIT_S} s"
        broken = wrong(code, out, err)
        return code, f"{broken}: {err.strip().splitlines()[0][:160] if err.strip() else ''}" if broken else ""


def case(seed: int) -> Case:
    """A random case."""
    draw = random.Random(seed)
    name = draw.choice(list(COMMANDS))
    command = draw.choice(COMMANDS[name])
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # numbers of thousands of digits may be written
    try:
        return Case(name, variant(name, Path(name).read_text(), draw), command)
    finally:
        sys.set_int_max_str_digits(limit)


def variant(name: str, text: str, draw: random.Random) -> bytes:
    """A spoiled form of a sample."""
    if draw.random() < 0.15:
        return spoiled_bytes(text.encode(), draw)
    times = draw.choice((1, 1, 1, 2, 3))
    if name.endswith(".csv"):
        rows: Any = [row.split(",") for row in text.splitlines()]
        for _ in range(times):
            rows = spoiled(rows, draw)
        out = io.StringIO()
        writer = csv.writer(out)
        for row in rows if isinstance(rows, list) else []:
            writer.writerow(row if isinstance(row, list) else [row])
        return out.getvalue().encode(errors="replace")
    load: Callable[[str], Any] = json.loads if name.endswith(".json") else yaml.safe_load
    value = load(text)
    for _ in range(times):
        value = spoiled(value, draw)
    if name.endswith(".json"):
        return json.dumps(value).encode(errors="replace")
    return str(yaml.safe_dump(value, allow_unicode=draw.random() < 0.5)).encode(errors="replace")
