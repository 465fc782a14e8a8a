"""Tensor parallelism: any layout to any layout, forward and back, gives what one process gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import spindle
from spindle import formats
from spindle.contract import contract
from spindle.errors import WorkloadError
from spindle.plan import Plan, Slice, make_waves
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport, Tolerance
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import VOCABULARY, floats, tokens

few = settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
ranks_and_seed = given(num_ranks=st.integers(2, 5), seed=st.integers(0, 10**6))


def language(heads: int = 4) -> nn.Module:
    """Grouped queries, norms of heads, tied embeddings."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = Qwen3ForCausalLM(config)
    return model


class Layer(nn.Module):
    """A hand-written layer with biases everywhere, a gate, and a weight that nothing cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.gate, self.down = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x_BTC: Tensor) -> Tensor:  # noqa: N803 - batch, time, channels
        y = self.norm(x_BTC)
        z: Tensor = x_BTC + self.scale * self.down(torch.tanh(self.up(y)) * self.gate(y))
        return z


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.out = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.out(x)
        return y


OWN_PLAN = {"layers.*.up": "colwise", "layers.*.gate": "colwise", "layers.*.down": "rowwise"}


def workload(*, degree: int = 4, frozen: bool = False, **options: Any) -> spindle.Workload:
    """An encoder into a language model, and each alone; both may be spread."""
    torch.manual_seed(0)
    made = spindle.Workload("spread", **options)
    encoder = made.component("encoder", Encoder().double(), tensor_parallel=degree, tensor_plan=OWN_PLAN)
    lm: Any = made.component("lm", language().double(), tensor_parallel=degree, optimizer={"lr": 0.05})
    if frozen:
        encoder.layers[1].requires_grad_(False)

    def rows(batch: int, seed: int) -> list[dict[str, Tensor]]:
        return [
            {
                "frames": floats(batch, 3, 5, seed=seed + i, dtype=torch.float64),
                "tokens": tokens(batch, 6, seed + i),
                "y": floats(batch, 16, seed=seed + i + 50, dtype=torch.float64),
            }
            for i in range(2)
        ]

    def next_word(logits: Tensor, words: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())

    @made.task("describe", batch_size=5, data=rows(5, 1))
    def describe(batch: dict[str, Tensor]) -> Tensor:
        words = lm.get_input_embeddings()(batch["tokens"])
        logits = lm(inputs_embeds=torch.cat([encoder(batch["frames"]), words], 1)).logits
        return next_word(logits[:, 3:], batch["tokens"])

    @made.task("fit", batch_size=4, data=rows(4, 20))
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(encoder(batch["frames"]).mean(1), batch["y"])

    return made


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def compared(made: spindle.Workload, plan: Plan, launcher: Any = "threads") -> ParityReport:
    reference = parity.run_reference(made, 3, optimizer=momentum)
    with launched(prepare(made, plan), optimizer=momentum, launcher=launcher, timeout_s=30.0) as run:
        losses, reports = run.steps(3, keep_gradients=True)
        final = {name: value for name, value in run.state().items() if name in reference.parameters}
    assert final.keys() == reference.parameters.keys()
    return parity.compare(reference, losses, reports, final, tolerance=Tolerance(1e-10, 1e-10))


@few
@ranks_and_seed
def test_random_layouts_are_exact(num_ranks: int, seed: int) -> None:
    """Copies of 1, 2 or 4 ranks in any order hand their samples to copies of other sizes, and take gradients back."""
    made = workload()
    report = compared(made, random_plan(spindle.make_metagraph(made), num_ranks, seed))
    assert report.ok, str(report)


@settings(few, max_examples=3)
@given(num_ranks=st.integers(2, 4), seed=st.integers(0, 10**6))
@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.3}, {"shard_optimizer": True}, {"recompute": ["encoder", "lm"]}, {"frozen": True}],
    ids=lambda options: next(iter(options)),
)
def test_features_go_along(options: dict[str, Any], num_ranks: int, seed: int) -> None:
    """Clipping counts every piece once; sharded states, recompute and frozen layers know pieces too."""
    made = workload(**options)
    report = compared(made, random_plan(spindle.make_metagraph(made), num_ranks, seed))
    assert report.ok, str(report)


def spread(made: spindle.Workload, num_devices: int, degree: int) -> Plan:
    """Everything that can be cut in one copy of `degree` ranks, one MetaOp after another."""
    metagraph = contract(prepare(made, widest_plan(spindle.make_metagraph(made), 1)).captured.graph)
    slices = []
    for place, name in enumerate(metagraph.topological_order):
        parts = degree if metagraph[name].operators[0].tensor_parallel > 1 else 1
        slices.append(
            Slice(
                metaop=name,
                first_layer=0,
                num_layers=metagraph[name].layers,
                devices=tuple(range(parts)),
                start_s=float(place),
                end_s=float(place + 1),
                tensor_parallel=parts,
            )
        )
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="spread",
        waves=make_waves(slices),
        makespan_s=float(len(slices)),
    )


@pytest.mark.gloo
def test_processes_agree_too() -> None:
    """Over gloo, with collectives inside the layers."""
    made = workload(degree=2)
    report = compared(made, spread(made, 2, 2), "processes")
    assert report.ok, str(report)


SLOW = """
nodes: 1
devices_per_node: 4
device: {name: slow, memory_gib: 8, peak_tflops: 0.0001, memory_bandwidth_gbps: 0.1}
intra_node: {bandwidth_gbps: 300, latency_us: 1}
"""


def test_the_planner_spreads_layers_where_that_is_faster(tmp_path: Path) -> None:
    """On slow devices with fast links five samples on four devices go by tensor parallelism; the run is exact."""
    (tmp_path / "slow.yaml").write_text(SLOW)
    made = workload()
    plan = spindle.make_plan(made, str(tmp_path / "slow.yaml"))
    layouts = {(len(s.devices), s.tensor_parallel) for s in plan if s.metaop.startswith("describe.lm.layers")}
    assert any(degree > 1 for _, degree in layouts), str(plan)
    formats.write(plan, tmp_path / "plan.json")
    report = compared(made, formats.read(tmp_path / "plan.json", Plan))
    assert report.ok, str(report)


def test_a_rank_holds_only_its_pieces() -> None:
    """Spread over four ranks, each holds a quarter of what is cut, and of its gradients and states."""
    made = workload()
    prepared = prepare(made, spread(made, 4, 4))
    held = {name: bucket.ranks for bucket in prepared.program.buckets for name in bucket.parameters}
    for index in range(4):
        assert held[f"encoder.layers.0.up.weight@{index}/4/0"] == (index,)
        assert held[f"lm.model.layers.1.self_attn.o_proj.weight@{index}/4/1"] == (index,)
    assert held["encoder.layers.0.down.bias"] == (0, 1, 2, 3)
    assert "encoder.layers.0.up.weight" not in held


def test_checkpoints_know_no_layout(tmp_path: Path) -> None:
    """A run spread over four ranks is resumed by two that hold everything, and goes on as one that never stopped."""
    plans = [spread(workload(), 4, 4), widest_plan(spindle.make_metagraph(workload()), 2)]
    whole, first, second = workload(), workload(), workload()
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "launcher": "threads"}
    spindle.train(whole, plans[1], steps=5, **options)
    spindle.train(first, plans[0], steps=3, checkpoints=tmp_path, **options)
    spindle.train(second, plans[1], steps=5, checkpoints=tmp_path, resume=True, **options)
    expected = dict(whole.named_parameters())
    for name, value in second.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_plan": None}, "the model has no plan"),
        ({"tensor_plan": {"blocks.*.up": "colwise"}}, "names nothing inside its blocks"),
        ({"tensor_plan": {"layers.*.up": "sideways"}}, "the styles are colwise, rowwise"),
        ({"tensor_plan": {"layers.*.norm": "colwise"}}, "only torch.nn.Linear can be cut"),
        ({"tensor_plan": OWN_PLAN, "tensor_parallel": 3}, "must divide them"),
    ],
)
def test_plans_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    """The message names the component, the layer and what would do."""
    made = spindle.Workload("wrong")
    encoder = made.component("encoder", Encoder(), **{"tensor_parallel": 2, **options})

    @made.task("fit", batch_size=2, data=[{"x": torch.zeros(2, 3, 5)}])
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return encoder(batch["x"]).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(WorkloadError, match=said):
        spindle.make_metagraph(made)
