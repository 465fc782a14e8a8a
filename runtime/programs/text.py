"""Program text: a Program in, lines that people read and diff out, and back.

spindle.program 2
ranks 2
loss image-text image-text/loss:0 weight 1.0
tensor image-text/vision.pre:0 float32 8,17,32 rows 1 dim 0 of samples grad
slice s0 image-text.vision.layers task image-text component vision wave 0 loads backward
  operators image-text.vision.layers.0 image-text.vision.layers.1
  ranks 0 1
  bounds 0:4 4:8
  inputs image-text/vision.pre:0
  outputs image-text/vision.layers.1:0
transfer s0>s1 from s0 to s1 forward
  image-text/vision.layers.1:0 1 -> 0 samples 4:8
bucket b0 float32 ranks 0 1
  vision.encoder.layers.0.weight
rank 0
  LOAD image-text
  AGREE
  FORWARD s0
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import quote, unquote

from spindle.errors import FormatError
from spindle.runtime.programs.program import (
    Bucket,
    Fetch,
    Flat,
    Handover,
    Instruction,
    Message,
    Op,
    Program,
    SliceRun,
    State,
    Tally,
    Transfer,
    Write,
)
from spindle.values.graph import TensorSpec
from spindle.values.units import SAMPLES

HEADER = "spindle.program 2"
_UNSAFE = re.compile(r"[%\s]")
_TOUCHED = ("statistics", "states", "flats")
_FLAGS = ("loads", "backward", "recompute", "varies")


def dumps(program: Program) -> str:
    """The program as text; `loads` gives an equal program back."""
    return "\n".join(_lines(program)) + "\n"


def _lines(program: Program) -> Iterator[str]:
    yield HEADER
    yield f"ranks {program.num_ranks}"
    if program.max_grad_norm is not None:
        yield f"clip {program.max_grad_norm!r}"
    weights = dict(program.weights)
    for task, tensor in program.losses:
        yield f"loss {_word(task)} {_word(tensor)} weight {weights[task]!r}"
    for t in program.tensors:
        shape = ",".join(map(str, t.shape)) or "scalar"
        grad = " grad" if t.needs_grad else ""
        yield f"tensor {_word(t.name)} {t.dtype} {shape} rows {t.rows} dim {t.row_dim} of {_word(t.unit) or '-'}{grad}"
    for run in program.slices:
        flags = "".join(f" {flag}" for flag in _FLAGS if getattr(run, flag))
        flags += f" parts:{run.tensor_parallel}" if run.tensor_parallel > 1 else ""
        flags += f" by:{_word(run.weigh_by)}" if run.weigh_by != SAMPLES else ""
        flags += f" turn:{run.turn}" if run.turn else ""
        name, metaop, task, component = map(_word, (run.name, run.metaop, run.task, run.component))
        yield f"slice {name} {metaop} task {task} component {component} wave {run.wave}{flags}"
        yield _row("operators", run.operators)
        yield _row("ranks", run.ranks)
        yield _row("bounds", (f"{low}:{high}" for low, high in run.bounds))
        yield _row("inputs", run.inputs)
        yield _row("outputs", run.outputs)
        yield _row("trained", run.trained)
        yield from (_row(label, getattr(run, label)) for label in _TOUCHED if getattr(run, label))
    for transfer in program.transfers:
        direction = "backward" if transfer.backward else "forward"
        ends = "".join(
            f" {label} {','.join(map(str, ranks))}"
            for label, ranks in (("senders", transfer.senders), ("receivers", transfer.receivers))
            if ranks
        )
        yield f"transfer {transfer.name} from {transfer.source} to {transfer.target} {direction}{ends}"
        for m in transfer.messages:
            yield f"  {_word(m.tensor)} {m.source} -> {m.target} samples {m.low}:{m.high}"
    for bucket in program.buckets:
        owner = "" if bucket.owner is None else f" owner {bucket.owner}"
        yield f"bucket {bucket.name} {bucket.dtype} ranks {' '.join(map(str, bucket.ranks))}{owner}"
        yield from (f"  {_word(name)}" for name in bucket.parameters)
    for flat in program.flats:
        frozen = "" if flat.trained else " frozen"
        yield f"flat {flat.name} {flat.dtype} ranks {' '.join(map(str, flat.ranks))}{frozen}"
        yield from (f"  {_word(name)}" for name in flat.parameters)
    yield from _state_lines(program)
    for rank, instructions in enumerate(program.instructions):
        yield f"rank {rank}"
        yield from (f"  {i.op} {_word(i.target)}".rstrip() for i in instructions)


def _state_lines(program: Program) -> Iterator[str]:
    for tally in program.tallies:
        yield f"tally {tally.name} ranks {' '.join(map(str, tally.ranks))}"
        yield from (f"  {_word(name)}" for name in tally.layers)
    for state in program.states:
        yield f"state {state.name} ranks {' '.join(map(str, state.ranks))}"
        yield from (f"  {_word(name)}" for name in state.buffers)
    for hand in program.handovers:
        before = f" before {hand.before}" if hand.before else ""
        yield f"handover {hand.name} of {hand.state} from {hand.source} to {' '.join(map(str, hand.targets))}{before}"
    for write in program.writes:
        when = ("within" if write.within else "after") if write.after else "before"
        when += "" if write.turn is None else f" turn:{write.turn}"
        yield f"write {write.name} task {_word(write.task)} {when} ranks {' '.join(map(str, write.ranks))}"
        yield from (f"  {_word(name)}" for name in write.parameters)
        for fetch in write.fetches:
            yield f"  {_word(fetch.parameter)} {fetch.source} -> {' '.join(map(str, fetch.targets))}"


def _word(name: object) -> str:
    """A name as one word: keys of a ModuleDict, and so names of parameters, may hold spaces."""
    return _UNSAFE.sub(lambda found: quote(found[0]), str(name))


def _row(label: str, values: Any) -> str:
    return f"  {label} {' '.join(map(_word, values))}".rstrip()


@dataclass
class _Parsed:
    num_ranks: int = 0
    max_grad_norm: float | None = None
    losses: list[tuple[str, str]] = field(default_factory=list)
    weights: list[tuple[str, float]] = field(default_factory=list)
    tensors: list[TensorSpec] = field(default_factory=list)
    slices: list[SliceRun] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    instructions: list[tuple[Instruction, ...]] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    handovers: list[Handover] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    flats: list[Flat] = field(default_factory=list)


def loads(text: str, *, source: str = "text") -> Program:
    """Parse `dumps`' text. Raises FormatError naming the line that cannot be read."""
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        raise FormatError(f"{source}: does not begin with {HEADER!r}; it is not a program of this version")
    parsed = _Parsed()
    for number, words, body in _blocks(lines[1:]):
        parse = _PARSERS.get(words[0])
        try:
            if parse is None:
                raise ValueError(f"unknown word {words[0]!r}")
            parse(parsed, words[1:], body)
        except (ValueError, IndexError, KeyError) as error:
            raise FormatError(
                f"{source}, line {number}: {' '.join(words)!r} cannot be read ({error}); mend it"
            ) from None
    return Program(
        num_ranks=parsed.num_ranks,
        tensors=tuple(parsed.tensors),
        slices=tuple(parsed.slices),
        transfers=tuple(parsed.transfers),
        buckets=tuple(parsed.buckets),
        losses=tuple(parsed.losses),
        weights=tuple(parsed.weights),
        instructions=tuple(parsed.instructions),
        max_grad_norm=parsed.max_grad_norm,
        tallies=tuple(parsed.tallies),
        states=tuple(parsed.states),
        handovers=tuple(parsed.handovers),
        writes=tuple(parsed.writes),
        flats=tuple(parsed.flats),
    )


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str], list[list[str]]]]:
    """Each head line with its number and the indented lines that follow it, all as words."""
    heads = [index for index, line in enumerate(lines) if line and not line.startswith(" ")]
    for start, end in pairwise([*heads, len(lines)]):
        yield start + 2, _words(lines[start]), [_words(line) for line in lines[start + 1 : end] if line.strip()]


def _words(line: str) -> list[str]:
    return [unquote(word) for word in line.split()]


def _parse_ranks(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    parsed.num_ranks = int(words[0])


def _parse_clip(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    parsed.max_grad_norm = float(words[0])


def _parse_loss(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    task, tensor, _, weight = words
    parsed.losses.append((task, tensor))
    parsed.weights.append((task, float(weight)))


def _parse_tensor(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, dtype, shape, _, rows, _, dim, _, unit, *grad = words
    sizes = () if shape == "scalar" else tuple(map(int, shape.split(",")))
    spec = TensorSpec(
        name=name,
        shape=sizes,
        dtype=dtype,
        rows=int(rows),
        row_dim=int(dim),
        needs_grad=grad == ["grad"],
        unit="" if unit == "-" else unit,
    )
    parsed.tensors.append(spec)


def _parse_slice(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, metaop, _, task, _, component, _, wave, *flags = words
    parts = [int(flag.removeprefix("parts:")) for flag in flags if flag.startswith("parts:")]
    units = [flag.removeprefix("by:") for flag in flags if flag.startswith("by:")]
    turns = [int(flag.removeprefix("turn:")) for flag in flags if flag.startswith("turn:")]
    flags = [flag for flag in flags if not flag.startswith(("parts:", "by:", "turn:"))]
    if not set(flags) <= set(_FLAGS):
        raise ValueError(f"flags are {', '.join(_FLAGS)}")
    rows = {row[0]: row[1:] for row in body}
    parsed.slices.append(
        SliceRun(
            name=name,
            metaop=metaop,
            task=task,
            component=component,
            wave=int(wave),
            operators=tuple(rows["operators"]),
            ranks=tuple(map(int, rows["ranks"])),
            bounds=tuple(_pair(bound) for bound in rows["bounds"]),
            inputs=tuple(rows["inputs"]),
            outputs=tuple(rows["outputs"]),
            trained=tuple(rows["trained"]),
            tensor_parallel=parts[0] if parts else 1,
            weigh_by=units[0] if units else SAMPLES,
            turn=turns[0] if turns else 0,
            statistics=tuple(rows.get("statistics", ())),
            states=tuple(rows.get("states", ())),
            flats=tuple(rows.get("flats", ())),
            **{flag: flag in flags for flag in _FLAGS},
        )
    )


def _parse_transfer(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, _, source, _, target, direction, *ends = words
    ranks = {label: tuple(map(int, numbers.split(","))) for label, numbers in zip(ends[::2], ends[1::2], strict=True)}
    if ranks.keys() - {"senders", "receivers"}:
        raise ValueError("ends are senders and receivers")
    messages = []
    for tensor, sender, _, receiver, _, samples in body:
        low, high = _pair(samples)
        messages.append(Message(tensor=tensor, source=int(sender), target=int(receiver), low=low, high=high))
    backward = {"forward": False, "backward": True}[direction]
    parsed.transfers.append(
        Transfer(name=name, source=source, target=target, backward=backward, messages=tuple(messages), **ranks)
    )


def _parse_bucket(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, dtype, _, *ranks = words
    owner = None
    if "owner" in ranks:
        *ranks, _, last = ranks
        owner = int(last)
    parameters = tuple(parameter for (parameter,) in body)
    parsed.buckets.append(
        Bucket(name=name, dtype=dtype, ranks=tuple(map(int, ranks)), parameters=parameters, owner=owner)
    )


def _parse_flat(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, dtype, _, *ranks = words
    trained = "frozen" not in ranks
    parsed.flats.append(
        Flat(
            name=name,
            dtype=dtype,
            ranks=tuple(int(rank) for rank in ranks if rank != "frozen"),
            parameters=tuple(parameter for (parameter,) in body),
            trained=trained,
        )
    )


def _parse_tally(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, _, *ranks = words
    layers = tuple(layer for (layer,) in body)
    parsed.tallies.append(Tally(name=name, ranks=tuple(map(int, ranks)), layers=layers))


def _parse_state(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, _, *ranks = words
    buffers = tuple(buffer for (buffer,) in body)
    parsed.states.append(State(name=name, ranks=tuple(map(int, ranks)), buffers=buffers))


def _parse_handover(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, _, state, _, source, _, *targets = words
    before = ""
    if "before" in targets:
        *targets, _, before = targets
    parsed.handovers.append(
        Handover(name=name, state=state, source=int(source), targets=tuple(map(int, targets)), before=before)
    )


def _parse_write(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    name, _, task, when, *rest = words
    turn = int(rest.pop(0).removeprefix("turn:")) if rest[0].startswith("turn:") else None
    ranks = rest[1:]
    fetches = (
        Fetch(parameter=row[0], source=int(row[1]), targets=tuple(map(int, row[3:]))) for row in body if len(row) > 1
    )
    parsed.writes.append(
        Write(
            name=name,
            task=task,
            after={"before": False, "after": True, "within": True}[when],
            turn=turn,
            within=when == "within",
            ranks=tuple(map(int, ranks)),
            parameters=tuple(row[0] for row in body if len(row) == 1),
            fetches=tuple(fetches),
        )
    )


def _parse_rank(parsed: _Parsed, words: list[str], body: list[list[str]]) -> None:
    if int(words[0]) != len(parsed.instructions):
        raise ValueError(f"ranks stand in order; here comes rank {len(parsed.instructions)}")
    parsed.instructions.append(tuple(Instruction(Op(row[0]), row[1] if len(row) > 1 else "") for row in body))


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split(":")
    return int(low), int(high)


_PARSERS: dict[str, Callable[[_Parsed, list[str], list[list[str]]], None]] = {
    "ranks": _parse_ranks,
    "clip": _parse_clip,
    "loss": _parse_loss,
    "tensor": _parse_tensor,
    "slice": _parse_slice,
    "transfer": _parse_transfer,
    "bucket": _parse_bucket,
    "flat": _parse_flat,
    "tally": _parse_tally,
    "state": _parse_state,
    "handover": _parse_handover,
    "write": _parse_write,
    "rank": _parse_rank,
}
