"""Samples: valid files of every format that the command line reads, how their values become bytes, and the commands
that read them. Small models, so that most commands take milliseconds; slow ones stand apart.
"""

import csv
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from spindle.files.formats import read, write
from spindle.planner.simulate import simulate
from spindle.runtime.checkpoints.checkpoint import About
from spindle.runtime.checkpoints.tensor_files import ABOUT
from spindle.runtime.comms.flight import EVENT, EVENTS_AT, HEAD, STATE, STATE_AT
from spindle.values.plan import Plan

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
TINY = """\
format: spindle.workload
version: 1
name: tiny
components:
  eye: {kind: mlp, widths: [64, 32]}
  lm: {kind: mlp, widths: [32, 8]}
tasks:
  match: {batch_size: 4, flow: [eye, lm], loss: other}
"""
CLUSTER = """\
nodes: 2
devices_per_node: 2
device: {name: own, memory_gib: 80, peak_tflops: 312, memory_bandwidth_gbps: 2039, reserved_gib: 4}
intra_node: {bandwidth_gbps: 300, latency_us: 6}
inter_node: {bandwidth_gbps: 25, latency_us: 15, node_bandwidth_gbps: 50}
"""
STEPS = "gpus,per_gpu_batch,seconds_per_step,table\n1,12,0.11,a\n2,12,0.12,a\n2,24,0.2,a\n"
MODEL = """\
import torch

import spindle

torch.manual_seed(0)
workload = spindle.Workload("small")
net = workload.component("net", torch.nn.Linear(2, 2))
workload.task("t", batch_size=4, data=[{"x": torch.ones(4, 2)}] * 9)(lambda batch: net(batch["x"]).square().mean())
"""
BREAKS = f"""\
{MODEL}

class Hot(torch.optim.SGD):
    def step(self, closure=None):
        raise ValueError("too hot")


def optimizer(parameters):
    return Hot(parameters, lr=0.1)
"""
WORDS = [
    ["plan", "tiny.yaml", "-c", "1x2:a100-80g", "--pin", "eye=0-1", "--tasks", "match", "--start", "gone.json"],
    ["plan", "graph.json", "-c", "2x2", "--nodes", "2", "--method", "sequential", "--time-limit", "0.01"],
    ["whatif", "graph.json", "--devices", "1,2", "-c", "1x2", "--time-limit", "0.01", "--efficiency", "0.5"],
    ["show", "plan.json", "--trace", "trace.json", "--html", "out.html", "--svg", "out.svg", "--json"],
    ["check", "plan.json", "-g", "graph.json"],
    ["flight", "crash/flight/1", "--last", "5", "--json"],
    ["checkpoints", "runs", "--verify", "--json"],
    ["export-plan", "plan.json", "--format", "megatron", "--language", "lm", "-o", "out.json"],
    ["import-galvatron", "galvatron/galvatron.yaml", "-o", "out.json"],
    ["submit", "-a", "http://127.0.0.1:1", "--job-id", "a", "--", "gone.py", "--steps", "1"],
]
"""Arguments: a command's words are spoiled as a file's values are."""
STEP = "runs/step-00000001"
GALVATRON = Path(__file__).with_name("exchange") / "galvatron"
QUICKLY = ("-c", "1x2", "--time-limit", "0.01")
NEVER = ("--start", "gone.json")  # all files are read before it, and it is not there: what would be planned is not

Commands = dict[str, list[tuple[str, ...]]]
COMMANDS: Commands = {
    "spec.yaml": [("plan", "FILE", "-c", "1x2", "--tasks", "gone"), ("plan", "FILE", *QUICKLY, *NEVER)],
    "cluster.yaml": [("plan", "tiny.yaml", "-c", "FILE", "-p", "gone.json")],
    "graph.json": [("check", "plan.json", "-g", "FILE"), ("plan", "FILE", *QUICKLY, *NEVER)],
    "plan.json": [("check", "FILE"), ("explain", "FILE"), ("show", "FILE"), ("show", "FILE", "--json"),
                  ("show", "FILE", "--svg", "out.svg"), ("diff", "FILE", "plan.json"), ("diff", "plan.json", "FILE"),
                  ("export-plan", "FILE", "--format", "megatron", "--language", "lm", "-o", "out.json")],
    "trace.json": [("show", "plan.json", "--trace", "FILE"), ("show", "plan.json", "--trace", "FILE", "--json"),
                   ("show", "plan.json", "--trace", "FILE", "--html", "out.html"),
                   ("show", "plan.json", "--trace", "FILE", "--chrome", "out.json")],
    "profile.json": [("plan", "tiny.yaml", "-p", "FILE", *QUICKLY, *NEVER)],
    "calibration.json": [("plan", "tiny.yaml", "--calibration", "FILE", *QUICKLY, *NEVER)],
    "galvatron/galvatron.yaml": [("import-galvatron", "FILE/galvatron.yaml", "-o", "out.json")],
    "galvatron/computation_profiling_bf16_tower_all.json": [
        ("import-galvatron", "FILE/galvatron.yaml", "-o", "out.json")],
    "galvatron/memory_profiling_bf16_tower_all.json": [("import-galvatron", "FILE/galvatron.yaml", "-o", "out.json")],
    f"{STEP}/{ABOUT}": [("checkpoints", "FILE"), ("checkpoints", "FILE", "--verify", "--json"),
                        ("checkpoints", STEP, "FILE/step-00000001")],
    f"{STEP}/shard-00001.safetensors": [("checkpoints", STEP, "FILE/step-00000001"),
                                        ("checkpoints", "FILE", "--verify")],
    f"{STEP}/progress.pt": [("checkpoints", "FILE", "--verify"), ("checkpoints", "FILE/step-00000001", STEP)],
    "crash/flight/1/end.json": [("flight", "FILE"), ("flight", "FILE", "--json")],
    "crash/flight/1/rank-00000.ring": [("flight", "FILE"), ("flight", "FILE", "--json"),
                                       ("flight", "FILE/flight/1", "--last", "100000")],
    "words": [("WORDS",)],
}  # fmt: skip
SLOW: Commands = {
    "spec.yaml": [("plan", "FILE", *QUICKLY),
                  ("whatif", "FILE", "--devices", "1,2", "--time-limit", "0.01"),
                  ("curves", "FILE", "-c", "1x2", "-o", "out.svg"),
                  ("graph", "FILE", "-c", "1x2", "-o", "out.svg")],
    "cluster.yaml": [("plan", "tiny.yaml", "-c", "FILE", "--time-limit", "0.01")],
    "graph.json": [("plan", "FILE", *QUICKLY)],
    "plan.json": [("plan", "tiny.yaml", "--start", "FILE", *QUICKLY)],
    "profile.json": [("plan", "tiny.yaml", "-p", "FILE", *QUICKLY)],
    "calibration.json": [("plan", "tiny.yaml", "--calibration", "FILE", *QUICKLY)],
    "steps.csv": [("calibrate", "tiny.yaml", "-c", "1x4", "--steps", "FILE", "-o", "out.json")],
    f"{STEP}/{ABOUT}": [("export", "model.py", "--checkpoint", "FILE/step-00000001", "-o", "exported")],
    f"{STEP}/shard-00001.safetensors": [("export", "model.py", "--checkpoint", "FILE/step-00000001", "-o", "exported")],
}  # fmt: skip
"""Commands of a second or so, which are tried less often."""


def prepare(run: Callable[..., tuple[int, str, str]]) -> None:
    """Valid files of every format, in this folder; `run` runs a command."""
    texts = {"spec.yaml": SPEC, "tiny.yaml": TINY, "cluster.yaml": CLUSTER, "steps.csv": STEPS, "model.py": MODEL}
    for name, text in (texts | {"breaks.py": BREAKS, "words": json.dumps(WORDS)}).items():
        Path(name).write_text(text)
    shutil.copytree(GALVATRON, "galvatron")
    train = ("--steps", "1", "--launcher", "threads", "--checkpoints")
    for code, arguments in (
        (0, ("plan", "tiny.yaml", "-c", "1x2", "-o", "plan.json", "--time-limit", "0.5")),
        (0, ("calibrate", "tiny.yaml", "-c", "1x4", "--steps", "steps.csv", "-o", "calibration.json")),
        (0, ("train", "model.py", *train, "runs")),
        (1, ("train", "breaks.py", *train, "crash")),
    ):
        ended, _, err = run(*arguments)
        assert ended == code, err
    plan = json.loads(Path("plan.json").read_text())
    Path("graph.json").write_text(json.dumps(plan["metagraph"]))
    write(simulate(read("plan.json", Plan)), "trace.json")
    Path("profile.json").write_text(json.dumps(_profile()))


def _profile() -> dict[str, Any]:
    entry = {"num_devices": 1, "forward_s": 1e-4, "backward_s": 2e-4, "peak_bytes": 1e6}
    entries = [{"kind": name, **entry} for name in ("eye.blocks", "lm.blocks")]
    links = [{"operation": "all_reduce", "level": "intra_node", "members": 2, "num_bytes": n, "seconds": n * 1e-9}
             for n in (1000, 10**6)]  # fmt: skip
    loads = [{"task": "match", "batch_size": 8, "seconds": 0.01}]
    head = {"format": "spindle.profile", "version": 1, "device": "own"}
    return {**head, "entries": entries, "links": links, "loads": loads}


# -- values and bytes -------------------------------------------------------------------------------------------------


def value_of(name: str, data: bytes) -> Any:
    """What a sample holds, as lists, objects, texts and numbers."""
    match Path(name).suffix:
        case ".json" | "":
            return json.loads(data)
        case ".yaml":
            return yaml.safe_load(data)
        case ".csv":
            return [line.split(",") for line in data.decode().splitlines()]
        case ".safetensors":
            (size,) = struct.unpack_from("<Q", data)
            return {"header": json.loads(data[8 : 8 + size]), "bytes": len(data) - 8 - size}
        case ".ring":
            head, state = list(HEAD.unpack_from(data)), list(STATE.unpack_from(data, STATE_AT))
            events = [list(EVENT.unpack_from(data, EVENTS_AT + n * EVENT.size)) for n in range(min(state[0], 20))]
            return _as_text({"head": head, "state": state, "events": events})
    return None


def bytes_of(name: str, value: Any, sample: bytes) -> bytes:
    """A file that holds a value; the sample where no file of the format can."""
    match Path(name).suffix:
        case ".json" | "":
            return json.dumps(value).encode(errors="replace")
        case ".yaml":
            text = json.dumps(value)  # which is YAML too, and much faster written
            return (text if len(text) > 20_000 else str(yaml.safe_dump(value))).encode(errors="replace")
        case ".csv":
            out = io.StringIO()
            for row in value if isinstance(value, list) else []:
                csv.writer(out).writerow(row if isinstance(row, list) else [row])
            return out.getvalue().encode(errors="replace")
        case ".safetensors" if isinstance(value, dict):
            header, size = json.dumps(value.get("header")).encode(errors="replace"), value.get("bytes")
            return (
                struct.pack("<Q", len(header)) + header + bytes(size if type(size) is int and 0 <= size < 9999 else 0)
            )
        case ".ring":
            return _ring_of(value, sample)
    return sample


def _ring_of(value: Any, sample: bytes) -> bytes:
    data, value = bytearray(sample), _as_bytes(value)
    try:
        HEAD.pack_into(data, 0, *value["head"])
        STATE.pack_into(data, STATE_AT, *value["state"])
        for number, event in enumerate(value["events"][:400]):
            EVENT.pack_into(data, EVENTS_AT + number * EVENT.size, *event)
    except (struct.error, KeyError, IndexError, TypeError, OverflowError):
        return bytes(data)
    return bytes(data)


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_as_text(part) for part in value]
    return value.decode("latin-1").rstrip("\0") if isinstance(value, bytes) else value


def _as_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_bytes(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_as_bytes(part) for part in value]
    return value.encode(errors="replace") if isinstance(value, str) else value


def sign(step: Path, *, files: bool) -> None:
    """Make the checkpoint's own checksum that of what it says now; with `files` those of its files before."""
    import zlib

    try:
        about = json.loads((step / ABOUT).read_bytes())
        if files:
            contents = {name: (step / name).read_bytes() for name in about["files"]}
            about["files"] = {name: (len(data), zlib.crc32(data)) for name, data in contents.items()}
        (step / ABOUT).write_text(About.model_validate(about).signed().model_dump_json())
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return
