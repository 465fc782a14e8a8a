"""Files: every format survives the round trip, and everything that is not of a format is refused in a sentence."""

import copy
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.errors import FormatError, InputError
from spindle.files.formats import dumps, loads, read, write, write_text
from spindle.values.calibration import Calibration, MeasuredStep
from spindle.values.metagraph import Flow, MetaGraph, MetaOp
from spindle.values.plan import Certificate, Memory, Plan, Slice, make_waves
from spindle.values.profile import LinkEntry, LoadEntry, Profile, ProfileEntry
from spindle.values.trace import Span, SpanKind, Trace
from tests.spindle import value_strategies as values

Json = dict[str, object] | list[object] | str | float | bool | None

GRAPH = MetaGraph(
    (
        MetaOp(
            name="t.a",
            task="t",
            component="a",
            layers=2,
            layer_time_s=((1, 1.0), (2, 0.5)),
            memory_bytes=((1, 4.0), (2, 3.0)),
            parameters="a",
        ),
        MetaOp(name="t.b", task="t", component="b", layers=1, layer_time_s=((1, 2.0),)),
    ),
    (Flow("t.a", "t.b", 8.0),),
)
PLAN = Plan(
    num_devices=2,
    devices_per_node=2,
    method="hand",
    waves=make_waves(
        [
            Slice(metaop="t.a", first_layer=0, num_layers=2, devices=(0, 1), start_s=0.0, end_s=1.0),
            Slice(metaop="t.b", first_layer=0, num_layers=1, devices=(0,), start_s=1.0, end_s=3.0),
        ]
    ),
    makespan_s=3.0,
    lower_bound_s=2.0,
    baselines_s=(("sequential", 3.0),),
    memory=Memory(peak_bytes_per_device=(7.0, 3.0)),
    certificate=Certificate(area_price=1.0, paths=((0.5, ("t.a", "t.b")),)),
    metagraph=GRAPH,
)
PROFILE = Profile(
    "cpu",
    (("torch", "2"),),
    (ProfileEntry(kind="k", num_devices=1, forward_s=1.0, backward_s=2.0),),
    (LinkEntry(operation="all_reduce", level="intra_node", members=2, num_bytes=8, seconds=0.1),),
    (LoadEntry(task="t", batch_size=4, seconds=0.01),),
)
TRACE = Trace(
    num_ranks=2,
    source="measured",
    spans=(Span(rank=1, kind=SpanKind.FORWARD, name="FORWARD s0", start_s=0.0, end_s=1.0, wave=0),),
)
CALIBRATION = Calibration(
    device="d", rows=(MeasuredStep(gpus=8, per_gpu_batch=2, seconds=0.7),), inseparable=(("compute", "step_s"),)
)
SAMPLES: dict[str, tuple[str, type]] = {
    "metagraph": (dumps(GRAPH), MetaGraph),
    "plan": (dumps(PLAN), Plan),
    "profile": (dumps(PROFILE), Profile),
    "trace": (dumps(TRACE), Trace),
    "calibration": (dumps(CALIBRATION), Calibration),
}
each_format = pytest.mark.parametrize(("sample", "kind"), SAMPLES.values(), ids=SAMPLES)


def refusal(text: str, kind: type) -> str:
    """The sentence with which `text` is refused."""
    with pytest.raises(InputError) as caught:
        loads(text, kind, source="here")
    sentence = str(caught.value)
    assert sentence.startswith("here: ")
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 500
    return sentence


# -- round trips ------------------------------------------------------------------------------------------------------


@given(values.metagraphs())
def test_metagraphs_survive(graph: MetaGraph) -> None:
    assert loads(dumps(graph), MetaGraph) == graph


@given(values.plans)
def test_plans_survive(plan: Plan) -> None:
    assert loads(dumps(plan), Plan) == plan


@given(values.profiles)
def test_profiles_survive(profile: Profile) -> None:
    assert loads(dumps(profile), Profile) == profile


@given(values.calibrations)
def test_calibrations_survive(calibration: Calibration) -> None:
    assert loads(dumps(calibration), Calibration) == calibration


@given(values.traces)
def test_traces_survive(trace: Trace) -> None:
    assert loads(dumps(trace), Trace) == trace


@each_format
def test_one_value_has_one_text(sample: str, kind: type) -> None:
    """Text, value, text: the same bytes, so that files can be compared and digested."""
    assert dumps(loads(sample, kind)) == sample


@pytest.mark.parametrize(
    ("value", "left_out"),
    [
        (PROFILE, ["loads"]),
        (PROFILE, ["entries", "bare_forward_s"]),
        (GRAPH, ["shard_optimizer"]),
        (GRAPH, ["metaops", "load_s"]),
    ],
    ids=["profile", "entry", "metagraph", "metaop"],
)
def test_files_of_before_loaders_sharding_and_recompute_were_measured_are_read(
    value: Profile | MetaGraph, left_out: list[str]
) -> None:
    """What they lack is none."""
    data = json.loads(dumps(value))
    for item in data[left_out[0]] if len(left_out) > 1 else [data]:
        del item[left_out[-1]]
    without = replace(value, loads=()) if isinstance(value, Profile) and left_out == ["loads"] else value
    kind = Profile if isinstance(value, Profile) else MetaGraph
    assert loads(json.dumps(data), kind) == without  # type: ignore[type-var]


def test_the_metagraph_of_the_contract_is_read() -> None:
    """The example of the design page, field by field."""
    text = """{"format": "spindle.metagraph", "version": 1,
     "metaops": [{"name": "t1.vision", "task": "t1", "component": "vision", "layers": 32,
                  "layer_time_s": {"4": 0.0068, "1": 0.0242, "2": 0.0126},
                  "memory_bytes": {"1": 3.4e10, "2": 1.8e10, "4": 1.0e10},
                  "layer_param_bytes": 39321600, "output_bytes": 84213760, "parameters": "vision"},
                 {"name": "t1.loss", "task": "t1", "component": "loss", "layers": 1, "layer_time_s": {"1": 0.001}}],
     "flows": [["t1.vision", "t1.loss"]]}"""
    graph = loads(text, MetaGraph)
    assert graph["t1.vision"].layer_time_s == ((1, 0.0242), (2, 0.0126), (4, 0.0068))
    assert graph["t1.vision"].layer_param_bytes == 39321600
    assert graph["t1.loss"].parameters == ""
    assert graph.flow_bytes(graph.flows[0]) == 84213760


def test_traces_of_before_peaks_of_memory_are_read() -> None:
    value = json.loads(dumps(TRACE))
    assert value.pop("peak_bytes") == []
    assert loads(json.dumps(value), Trace) == TRACE


# -- text that is not JSON --------------------------------------------------------------------------------------------


@each_format
@settings(max_examples=25)
@given(part=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(sample: str, kind: type, part: float) -> None:
    assert "not JSON" in refusal(sample[: int(part * len(sample))], kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON (Expecting value"),
        ("spindle", "not JSON (Expecting value"),
        ("[" * 200_000, "not JSON (maximum recursion"),
        ("[" * 200_000 + "]" * 200_000, "not JSON (maximum recursion"),
        ("1" * 10_000, "not JSON (Exceeds the limit"),
        ("\ufeff{}", "not JSON (Unexpected UTF-8 BOM"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice in one object; keep one"),
        ('{"format": "spindle.plan", "version": 1, "waves": [{"x": 1, "x": 1}]}', "key 'x' stands twice"),
        ("{}", "format is None; this Spindle reads spindle.metagraph, spindle.plan"),
        ("[]", "format is None"),
        ("null", "format is None"),
        ("3", "format is None"),
        ('"spindle.plan"', "format is None"),
        ('{"format": 3}', "format is 3"),
        ('{"format": ["spindle.plan"]}', "format is ['spindle.plan']"),
        ('{"format": "spindle.plam", "version": 1}', "format is 'spindle.plam'"),
    ],
)
def test_text_that_is_no_format(text: str, words: str) -> None:
    """Nothing, prose, bottomless nesting, endless numbers, keys given twice, other JSON."""
    assert words in refusal(text, Plan)


# -- JSON that is not of its format -----------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1]])
def test_unknown_versions_are_refused(sample: str, kind: type, version: object) -> None:
    """Also those that Python or JSON would take for 1."""
    text = sample.replace('"version": 1', f'"version": {json.dumps(version)}')
    assert f"version {version!r}; this Spindle reads version 1, write the file again" in refusal(text, kind)


@each_format
def test_a_file_without_version_is_refused(sample: str, kind: type) -> None:
    assert "version None" in refusal(sample.replace('"version": 1,', ""), kind)


@pytest.mark.parametrize("given_as", SAMPLES)
@pytest.mark.parametrize("wanted", SAMPLES)
def test_a_file_of_another_format_is_refused(given_as: str, wanted: str) -> None:
    if given_as != wanted:
        words = refusal(SAMPLES[given_as][0], SAMPLES[wanted][1])
        assert f"is a spindle.{given_as} file; here a {SAMPLES[wanted][1].__name__} is needed" in words


Path_ = tuple[str | int, ...]


def places(value: Json, path: Path_ = ()) -> Iterator[tuple[Path_, Json]]:
    """Every value inside a JSON value, with the way to it."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))  # type: ignore[arg-type]


def changed(text: str, path: Path_, change: Callable[[object], object]) -> str:
    """The text with one value inside it changed."""
    value = {"root": copy.deepcopy(json.loads(text))}
    holder, path = value, ("root", *path)
    for key in path[:-1]:
        holder = holder[key]  # type: ignore[index]
    holder[path[-1]] = change(holder[path[-1]])  # type: ignore[index]
    return json.dumps(value["root"])


FREE_TABLES = {"layer_time_s", "memory_bytes", "tensor_parallel", "baselines_s", "baseline_steps_s", "versions"}
OBJECTS = [
    pytest.param(sample, kind, path, id=f"{name}:{'.'.join(map(str, path))}")
    for name, (sample, kind) in SAMPLES.items()
    for path, value in places(json.loads(sample))
    if isinstance(value, dict) and not FREE_TABLES & set(path[-1:])
]
NUMBERS = [
    pytest.param(sample, kind, path, id=f"{name}:{'.'.join(map(str, path))}")
    for name, (sample, kind) in SAMPLES.items()
    for path, value in places(json.loads(sample))
    if isinstance(value, int | float) and not isinstance(value, bool)
]
VALUES = [
    pytest.param(sample, kind, path, value, id=f"{name}:{'.'.join(map(str, path))}")
    for name, (sample, kind) in SAMPLES.items()
    for path, value in places(json.loads(sample))
    if path and path[-1] not in ("format", "version")
]


@pytest.mark.parametrize(("sample", "kind", "path"), OBJECTS)
def test_unknown_fields_are_refused_by_name(sample: str, kind: type, path: Path_) -> None:
    """In every object of every format."""
    text = changed(sample, path, lambda value: {**value, "color": "red"})  # type: ignore[dict-item]
    assert "color is not a known field; remove it" in refusal(text, kind)


@pytest.mark.parametrize(("sample", "kind", "path"), NUMBERS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_every_number_is_one(sample: str, kind: type, path: Path_, number: float) -> None:
    """NaN and infinity, which Python's JSON lets in, are refused wherever a number stands."""
    refusal(changed(sample, path, lambda _: number), kind)


@pytest.mark.parametrize(("sample", "kind", "path", "value"), VALUES)
def test_every_value_has_its_type(sample: str, kind: type, path: Path_, value: Json) -> None:
    """Text for a number, a number for text, an object for a list, and null: refused, never converted."""
    wrong: list[object] = [["x"], {"x": []}] if not isinstance(value, list | dict) else [3, "x"]
    wrong += [3] if isinstance(value, str | bool) else [str(value), True]
    for other in wrong:
        refusal(changed(sample, path, lambda _, other=other: other), kind)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("one", "keys should be device counts"),
        ("01", "keys should be device counts"),  # would hide or be hidden by "1"
        (" 1", "keys should be device counts"),
        ("1.0", "keys should be device counts"),
        ("-1", "keys should be device counts"),
        ("1_0", "keys should be device counts"),
        ("\u0664", "keys should be device counts"),  # the digit four, but not ours
        ("", "keys should be device counts"),
        ("0", "counts start at 1"),
    ],
)
def test_device_counts_are_plain_numbers(key: str, words: str) -> None:
    text = changed(dumps(GRAPH), ("metaops", 0, "layer_time_s"), lambda _: {key: 1.0})
    assert words in refusal(text, MetaGraph)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("metaops",), [], "no MetaOps"),
        (("metaops", 0, "layers"), 0, "layers is 0"),
        (("metaops", 0, "layers"), -2, "layers is -2"),
        (("metaops", 0, "name"), "t.b", "'t.b' stands twice"),
        (("metaops", 0, "layer_time_s"), {}, "layer_time_s is empty; give a time"),
        (("metaops", 0, "layer_time_s"), {"1": 0.0}, "is 0.0; it must be a positive number"),
        (("metaops", 0, "layer_time_s"), {"1": -1.0}, "is -1.0; it must be a positive number"),
        (("flows",), [["t.a", "t.z"]], "names MetaOp 't.z', which does not exist"),
        (("flows",), [["t.a", "t.a"]], "leads back to its own MetaOp"),
        (("flows",), [["t.a"]], "flows.0"),
        (("flows",), [["t.a", "t.b"], ["t.b", "t.a"]], "flow_bytes has 1 values for 2 flows"),
        (("flow_bytes",), [-1.0], "carries -1.0 bytes"),
        (("flow_bytes",), [1.0, 2.0], "flow_bytes has 2 values for 1 flows; give one each"),
    ],
)
def test_rules_hold_for_files(path: Path_, value: Json, words: str) -> None:
    """What a value refuses it refuses when it comes from a file, with the file's name in front."""
    assert words in refusal(changed(dumps(GRAPH), path, lambda _: value), MetaGraph)


def test_a_circle_in_a_file() -> None:
    flat = changed(dumps(GRAPH), ("flow_bytes",), lambda _: [])
    circle = changed(flat, ("flows",), lambda _: [["t.a", "t.b"], ["t.b", "t.a"]])
    assert "t.a -> t.b -> t.a depend on each other in a circle" in refusal(circle, MetaGraph)


def test_only_the_first_findings_are_told() -> None:
    text = changed(dumps(GRAPH), ("metaops",), lambda _: [{} for _ in range(50)])
    assert refusal(text, MetaGraph).endswith("; and 248 more")


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_files_come_back(tmp_path: Path) -> None:
    write(PLAN, tmp_path / "plan.json")
    assert read(tmp_path / "plan.json", Plan) == PLAN
    assert read(str(tmp_path / "plan.json"), Plan) == PLAN


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, bytes that are no text."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    reasons = {"missing.json": "No such file", "folder.json": "Is a directory", "bytes.json": "not text"}
    for name, reason in reasons.items():
        with pytest.raises(FormatError, match=rf"{name}: cannot be read \({reason}.*\); check the path"):
            read(tmp_path / name, Plan)


@pytest.mark.parametrize("path", ["nowhere/plan.json", "folder"])
def test_paths_that_cannot_be_written_regression(tmp_path: Path, path: str) -> None:
    """Refused, and nothing is left behind, not even a temporary file."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match=r"cannot be written \(.*\); check the folder"):
        write(PLAN, tmp_path / path)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step fails, the old file stands untouched and nothing else is left."""
    target = tmp_path / "plan.json"
    write_text("old", target)

    def full(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FormatError, match="No space left on device"):
        write_text("new", target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """Not the mode of a temporary file."""
    write_text("text", tmp_path / "a.txt")
    before = os.umask(0o022)
    try:
        for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(mask)
            write_text("x", tmp_path / "a.txt")
            assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    finally:
        os.umask(before)
