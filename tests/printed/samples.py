"""Files for the command line: a MetaGraph, a spec and a model that fit on a page, and their broken forms."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

METAGRAPH: dict[str, Any] = {
    "format": "spindle.metagraph",
    "version": 1,
    "metaops": [
        {
            "name": "t.tower",
            "task": "t",
            "component": "tower",
            "layers": 2,
            "layer_time_s": {"1": 0.2, "2": 0.1},
            "memory_bytes": {"1": 1e9, "2": 5e8},
        },
        {"name": "t.loss", "task": "t", "component": "loss", "layers": 1, "layer_time_s": {"1": 0.3}},
    ],
    "flows": [["t.tower", "t.loss"]],
}

SPEC = """\
format: spindle.workload
version: 1
name: small
components:
  eye: {layers: 2, hidden: 64, heads: 2, tokens: 16, output_tokens: 1, output_features: 32}
  ear: {layers: 2, hidden: 32, heads: 2, tokens: 8, output_tokens: 1, output_features: 32}
tasks:
  match: {batch_size: 8, flow: [[eye, ear]], loss: contrastive}
"""

MODEL = """\
import itertools

import torch

import spindle

torch.manual_seed(0)
rows = [{"x": torch.ones(4, 2)}]


def one_task(name, function, data=rows, inputs=2):
    found = spindle.Workload(name)
    net = found.component("net", torch.nn.Linear(inputs, 2))
    found.task("t", batch_size=4, data=data)(lambda batch: function(net, batch["x"]))
    return found


def loss(net, x):
    return net(x).square().mean()


def raises(net, x):
    net(x)
    raise RuntimeError("too wet\\nto run")


def burns():
    raise OSError("disk on fire")


counter = itertools.count(1)


def other():
    return [{"x": torch.full((4, 2), float(next(counter)))}]


workload = one_task("workload", loss)
nothing = spindle.Workload("nothing")
raising = one_task("raising", raises)
drifting = one_task("drifting", loss, data=other)
misshapen = one_task("misshapen", loss, inputs=3)
no_scalar = one_task("no_scalar", lambda net, x: net(x))
no_data = one_task("no_data", loss, data=[])
burning = one_task("burning", loss, data=burns)
packed = one_task("packed", loss, data=[{"x": torch.ones(4, 2), "pixels": torch.ones(7, 2)}])
number = 3


def factory():
    return workload


def broken_factory():
    raise ValueError("no model today")


def quits(net, x):
    raise SystemExit(0)


def overflows(net, x):
    return loss(net, x) * float("inf")


quitting = one_task("quitting", quits)
overflowing = one_task("overflowing", overflows)
"""


def metagraph_file(path: Path, change: Callable[[dict[str, Any]], object] | None = None) -> str:
    """Write the MetaGraph, changed; the file's name."""
    data = copy.deepcopy(METAGRAPH)
    if change is not None:
        change(data)
    path.write_text(json.dumps(data))
    return path.name
