"""One workload that fits in the head, its plan, and the program that must come out, as text.

Task t: two equal layers of component a, then a loss that mixes samples. Rank 0 and 1 share the batch of five in the
layers; the loss runs on rank 1 alone. So samples 0..3 travel there, and their gradients back. Before that both ranks
load the batch and see that they agree on it.
"""

from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.program import Program
from spindle.values.contract import contract
from spindle.values.graph import Operator, Parameter, TaskGraph, TensorSpec
from spindle.values.plan import Plan, Slice, make_waves

TEXT = """\
spindle.program 2
ranks 2
loss t t/loss weight 0.5
tensor t/loss float32 scalar rows 0 dim 0 of - grad
tensor t/y float32 5,2 rows 1 dim 0 of samples grad
slice s0 t.a task t component a wave 0 loads backward
  operators t.a.0 t.a.1
  ranks 0 1
  bounds 0:3 3:5
  inputs
  outputs t/y
  trained a.0.w a.1.w
slice s1 t.loss task t component loss wave 1 loads backward
  operators t.loss
  ranks 1
  bounds 0:5
  inputs t/y
  outputs t/loss
  trained scale
transfer s0>s1 from s0 to s1 forward
  t/y 0 -> 1 samples 0:3
transfer s0<s1 from s1 to s0 backward
  t/y 1 -> 0 samples 0:3
bucket b0 float32 ranks 0 1
  a.1.w
  a.0.w
bucket b1 float32 ranks 1
  scale
rank 0
  LOAD t
  AGREE
  FORWARD s0
  TRANSFER s0>s1
  TRANSFER s0<s1
  AWAIT s0<s1
  BACKWARD s0
  FREE activations:s0
  FREE arrivals:s0<s1
  REDUCE b0
  AWAIT b0
  STEP
rank 1
  LOAD t
  AGREE
  FORWARD s0
  TRANSFER s0>s1
  AWAIT s0>s1
  FORWARD s1
  FREE arrivals:s0>s1
  BACKWARD s1
  FREE activations:s1
  TRANSFER s0<s1
  BACKWARD s0
  FREE activations:s0
  FREE gradients:s1
  REDUCE b0
  AWAIT b0
  STEP
"""


def hand_graph(*, batch_size: int = 5) -> TaskGraph:
    """Two layers and a loss."""

    def layer(index: int, reads: tuple[str, ...], makes: str) -> Operator:
        return Operator(
            name=f"t.a.{index}",
            task="t",
            component="a",
            kind="layer",
            batch_size=batch_size,
            inputs=reads,
            outputs=(TensorSpec(name=makes, shape=(batch_size, 2), dtype="float32", needs_grad=True),),
            parameters=(Parameter(name=f"a.{index}.w", shape=(2, 2), dtype="float32"),),
            input_bytes=64,
            batch_fields=() if reads else ("x",),
        )

    loss = Operator(
        name="t.loss",
        task="t",
        component="loss",
        kind="loss",
        batch_size=batch_size,
        inputs=("t/y",),
        outputs=(TensorSpec(name="t/loss", shape=(), dtype="float32", rows=0, needs_grad=True, unit=""),),
        parameters=(Parameter(name="scale", shape=(), dtype="float32"),),
        splittable=False,
    )
    return TaskGraph((layer(0, (), "t/x"), layer(1, ("t/x",), "t/y"), loss))


def hand_slice(metaop: str, first_layer: int, num_layers: int, devices: tuple[int, ...], start_s: float) -> Slice:
    """A slice that lasts a second."""
    return Slice(
        metaop=metaop,
        first_layer=first_layer,
        num_layers=num_layers,
        devices=devices,
        start_s=start_s,
        end_s=start_s + 1.0,
    )


def hand_plan(*slices: Slice, num_devices: int = 2) -> Plan:
    """A plan of these slices; without any, the one above."""
    chosen = slices or (hand_slice("t.a", 0, 2, (0, 1), 0.0), hand_slice("t.loss", 0, 1, (1,), 1.0))
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="hand",
        waves=make_waves(chosen),
        makespan_s=max(s.end_s for s in chosen),
    )


def lowered(plan: Plan | None = None, **options: object) -> Program:
    """The program of a plan for the workload above."""
    graph = hand_graph()
    given = {"losses": {"t": "t/loss"}, "weights": {"t": 0.5}} | options
    return lower(plan or hand_plan(), contract(graph), graph, **given)  # type: ignore[arg-type]
