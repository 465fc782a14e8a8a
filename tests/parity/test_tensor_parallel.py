"""Tensor parallelism: any layout to any layout, forward and back, gives what one process gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import spindle
from spindle.errors import WorkloadError
from spindle.files import formats
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport, Tolerance
from spindle.values.contract import contract
from spindle.values.plan import Plan, Slice, make_waves
from spindle.workload import Precision
from tests.drawn import SEEDS, drawn
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import VOCABULARY, floats, tokens

WORDS = VOCABULARY + 1  # four devices share them evenly


def language(heads: int = 4, *, tied: bool = True, words: int = WORDS, **options: Any) -> nn.Module:
    """Grouped queries, norms of heads; its embedding and its head share their words or not."""
    config = Qwen3Config(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=3,
        **options,
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


def next_word(logits: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def workload(
    *,
    degree: int = 4,
    frozen: bool = False,
    dtype: torch.dtype = torch.float64,
    fit_options: dict[str, Any] | None = None,
    **options: Any,
) -> spindle.Workload:
    """An encoder into a language model, and each alone; both may be spread. `fit_options` go to the second task."""
    torch.manual_seed(0)
    made = spindle.Workload("spread", **options)
    encoder = made.component("encoder", Encoder().to(dtype), tensor_parallel=degree, tensor_plan=OWN_PLAN)
    settings_of_lm = {"lr": 0.05, "weight_decay": 0.2}
    lm: Any = made.component("lm", language().to(dtype), tensor_parallel=degree, optimizer=settings_of_lm)
    if frozen:
        encoder.layers[1].requires_grad_(False)

    def rows(batch: int, seed: int) -> list[dict[str, Tensor]]:
        return [
            {
                "frames": floats(batch, 3, 5, seed=seed + i, dtype=dtype),
                "tokens": tokens(batch, 6, seed + i),
                "y": floats(batch, 16, seed=seed + i + 50, dtype=dtype),
            }
            for i in range(2)
        ]

    @made.task("describe", batch_size=5, data=rows(5, 1))
    def describe(batch: dict[str, Tensor]) -> Tensor:
        words = lm.get_input_embeddings()(batch["tokens"])
        logits = lm(inputs_embeds=torch.cat([encoder(batch["frames"]), words], 1)).logits
        return next_word(logits[:, 3:], batch["tokens"])

    @made.task("fit", batch_size=4, data=rows(4, 20), **(fit_options or {}))
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(encoder(batch["frames"]).mean(1), batch["y"])

    return made


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


EXACT = Tolerance(1e-10, 1e-10)


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    return EXACT if dtype == torch.float64 else Tolerance(1e-4, 1e-5)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def compared(
    made: spindle.Workload,
    plan: Plan,
    launcher: Any = "threads",
    tolerance: Tolerance = EXACT,
    scheduler: Any = None,
    steps: int = 3,
) -> ParityReport:
    reference = parity.run_reference(made, steps, optimizer=momentum, scheduler=scheduler)
    prepared = prepare(made, plan)
    with launched(prepared, optimizer=momentum, scheduler=scheduler, launcher=launcher, timeout_s=30.0) as run:
        planned = parity.observed(run, steps)
    assert planned.values.keys() >= dict(made.named_parameters()).keys()
    return parity.compare(reference, planned, tolerance=tolerance)


@drawn(3, num_ranks=range(2, 6), seed=SEEDS)
def test_random_layouts_are_exact(num_ranks: int, seed: int) -> None:
    """Copies of 1, 2 or 4 ranks in any order hand their samples to copies of other sizes, and take gradients back."""
    made = workload()
    report = compared(made, random_plan(spindle.make_metagraph(made), num_ranks, seed))
    assert report.ok, str(report)


FEATURES: dict[str, dict[str, Any]] = {
    "clipping": {"max_grad_norm": 0.3},
    "sharded states": {"shard_optimizer": True, "max_grad_norm": 0.3},
    "recompute": {"recompute": ["encoder", "lm"]},
    "frozen": {"frozen": True},
    "accumulation": {"accumulate": 4, "in_flight": 2, "max_grad_norm": 0.3},
    "every second step": {"fit_options": {"every": 2}},
    "probability": {"fit_options": {"probability": 0.5}, "shard_optimizer": True},
    "loss weights": {"fit_options": {"weight": 3.0}},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@drawn(1, num_ranks=range(2, 5), seed=SEEDS)
def test_features_go_along(options: dict[str, Any], num_ranks: int, seed: int) -> None:
    """Clipping counts every piece once; states, recompute, schedules and tasks that rest know pieces too. A component's
    own learning rate and decay, and a schedule, are always there.
    """
    made = workload(**options)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    report = compared(made, plan, scheduler=halving, steps=4)
    assert report.ok, str(report)


Layouts = Callable[[str], tuple[int, int]]
"""Copies and devices a copy, by name of a MetaOp that can be cut."""


def laid_out(made: spindle.Workload, num_devices: int, layout_of: Layouts) -> Plan:
    """One MetaOp after another; what cannot be cut on one device."""
    metagraph = contract(prepare(made, widest_plan(spindle.make_metagraph(made), 1)).captured.graph)
    slices = []
    for place, name in enumerate(metagraph.topological_order):
        copies, parts = layout_of(name) if metagraph[name].operators[0].tensor_parallel > 1 else (1, 1)
        slices.append(
            Slice(
                metaop=name,
                first_layer=0,
                num_layers=metagraph[name].layers,
                devices=tuple(range(copies * parts)),
                start_s=float(place),
                end_s=float(place + 1),
                tensor_parallel=parts,
            )
        )
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="laid out",
        waves=make_waves(slices),
        makespan_s=float(len(slices)),
    )


def spread(made: spindle.Workload, num_devices: int, degree: int) -> Plan:
    """Everything that can be cut in copies of `degree` ranks, on all devices."""
    return laid_out(made, num_devices, lambda _: (num_devices // degree, degree))


def ask_and_answer(made: spindle.Workload, lm: Any) -> None:
    """Two tasks of one language model."""
    for name, seed in (("ask", 1), ("answer", 40)):
        rows = [{"tokens": tokens(5, 6, seed + i)} for i in range(2)]

        @made.task(name, batch_size=5, data=rows)
        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return next_word(lm(input_ids=batch["tokens"]).logits, batch["tokens"])


def talks(
    dtype: torch.dtype = torch.float64,
    precision: Precision = "fp32",
    max_grad_norm: float | None = None,
    **options: Any,
) -> spindle.Workload:
    """Two tasks of one language model, whose embedding and head are cut with its layers; `options` go to the model."""
    torch.manual_seed(0)
    made = spindle.Workload("talks", precision=precision, max_grad_norm=max_grad_norm)
    lm: Any = made.component("lm", language(**options).to(dtype), tensor_parallel=4)
    ask_and_answer(made, lm)
    return made


LAYOUTS = [(1, 2), (2, 2), (1, 4)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_embeddings_and_heads_are_cut(layout: tuple[int, int], dtype: torch.dtype, tied: bool) -> None:
    """Each rank looks up the words it holds and gives their logits; padding's gradient stays zero."""
    made = talks(dtype, tied=tied)
    plan = laid_out(made, 4, lambda _: layout)
    held = {name for bucket in prepare(made, plan).program.buckets for name in bucket.parameters}
    assert "lm.model.embed_tokens.weight@3/4/0" in held
    assert "lm.model.embed_tokens.weight" not in held
    assert ("lm.lm_head.weight@3/4/0" in held) is not tied
    report = compared(made, plan, tolerance=tolerance_of(dtype))
    assert report.ok, str(report)


@pytest.mark.parametrize("ask", [*LAYOUTS, (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tasks_hold_one_parameter_in_different_layouts(ask: tuple[int, int], dtype: torch.dtype) -> None:
    """Embedding, layers and head of one task in one layout, of the other in another, the embedding in a third."""
    others = {"ask": ask, "answer": (2, 2) if ask != (2, 2) else (4, 1)}
    made = talks(dtype)
    plan = laid_out(
        made, 4, lambda name: (1, 4) if name == "answer.lm.model.embed_tokens" else others[name.split(".")[0]]
    )
    report = compared(made, plan, tolerance=tolerance_of(dtype))
    assert report.ok, str(report)


def test_bf16_agrees_to_its_precision() -> None:
    """Parts are cast as the whole is; two tasks in two layouts sum their copies in bfloat16."""
    made = talks(torch.float32, precision="bf16", max_grad_norm=1.0)
    plan = laid_out(made, 4, lambda name: (1, 4) if name.startswith("ask") else (2, 2))
    tolerance = parity.default_tolerance(dict(made.named_parameters()), "bf16")
    report = compared(made, plan, tolerance=tolerance, steps=1)
    assert report.ok, str(report)
    assert {tensor.dtype for tensor in prepare(made, plan).program.tensors} == {"bfloat16", "float32"}


class Fused(nn.Module):
    """A layer whose first product holds two parts, so that what it gives is put together before they part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.down = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        z: Tensor = x + self.down(torch.tanh(gate) * up)
        return z


class FusedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(8, 12), nn.ModuleList(Fused() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


FUSED_PLAN = {
    "stem": "rowwise_rep",
    "layers.*.both": "colwise_gather_output",
    "layers.*.down": "rowwise_split_input",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_styles_that_give_and_take_all_features(layout: tuple[int, int]) -> None:
    """Between layers that put their outputs together and divide their inputs, all ranks of a copy compute alike."""
    torch.manual_seed(0)
    made = spindle.Workload("fused")
    encoder = made.component("encoder", FusedEncoder().double(), tensor_parallel=4, tensor_plan=FUSED_PLAN)

    @made.task("fit", batch_size=4, data=[{"x": floats(4, 3, 8, seed=1, dtype=torch.float64)}])
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return encoder(batch["x"]).square().mean()  # type: ignore[no-any-return]

    report = compared(made, laid_out(made, 4, lambda _: layout))
    assert report.ok, str(report)


class Dropping(nn.Module):
    """Attention whose dropped weights are of some heads, here folded into the samples and there beside them; dropout of
    cut features, of whole ones, of whole paths; and noise that no sample has to itself.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm = nn.LayerNorm(12)
        self.q, self.k, self.v, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12)
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(*y.shape[:2], -1, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2)).flatten(0, 1).softmax(-1)
        own = F.dropout(weights, self.rate).view(q.shape[0], -1, *weights.shape[1:]) @ v
        own = own + F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate)
        x = x + F.dropout(self.out(own.transpose(1, 2).flatten(2)), self.rate)
        path = (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) > self.rate).to(x.dtype)
        hidden = F.dropout(self.up(x).relu(), self.rate)
        z: Tensor = x + path * self.down(hidden * (1 + 0.1 * torch.randn(hidden.shape[-1], dtype=x.dtype)))
        return z


class DroppingEncoder(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dropping(rate) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


DROPPING_PLAN = {f"layers.*.{name}": "colwise" for name in ("q", "k", "v", "up")}
DROPPING_PLAN |= {"layers.*.out": "rowwise", "layers.*.down": "rowwise"}


def drops(rate: float = 0.3, **options: Any) -> spindle.Workload:
    torch.manual_seed(0)
    made = spindle.Workload("drops", **options)
    encoder = made.component("encoder", DroppingEncoder(rate).double(), tensor_parallel=4, tensor_plan=DROPPING_PLAN)

    @made.task("fit", batch_size=5, data=[{"x": floats(5, 3, 12, seed=1, dtype=torch.float64)}])
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return encoder(batch["x"]).square().mean()  # type: ignore[no-any-return]

    return made


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", [*LAYOUTS, (4, 1)], ids=str)
def test_dropout_draws_its_part_of_the_whole(layout: tuple[int, int], recompute: bool) -> None:
    """The same numbers whatever the layout, where the features that are dropped are cut and where they are not."""
    made = drops(recompute=["encoder"] if recompute else [])
    report = compared(made, laid_out(made, 4, lambda _: layout))
    assert report.ok, str(report)


@drawn(3, num_ranks=range(2, 6), seed=SEEDS)
def test_dropout_in_random_layouts(num_ranks: int, seed: int) -> None:
    """Each layer in a layout of its own."""
    made = drops()
    report = compared(made, random_plan(spindle.make_metagraph(made), num_ranks, seed))
    assert report.ok, str(report)


def test_a_models_own_attention_dropout() -> None:
    """A model of transformers with its own plan, its two tasks in two layouts."""
    made = talks(attention_dropout=0.2)
    report = compared(made, laid_out(made, 4, lambda name: (1, 4) if name.startswith("ask") else (2, 2)))
    assert report.ok, str(report)


def test_what_a_models_own_plan_names_and_does_not_fit_stays_whole() -> None:
    """Four devices cannot share 23 words evenly: layers are cut, embedding and head are not."""
    made = talks(words=VOCABULARY)
    prepared = prepare(made, spread(made, 4, 4))
    held = {name for bucket in prepared.program.buckets for name in bucket.parameters}
    assert "lm.model.embed_tokens.weight" in held
    assert "lm.model.layers.0.mlp.up_proj.weight@3/4/0" in held


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
    layouts = {(len(s.devices), s.tensor_parallel) for s in plan if s.metaop.startswith("describe.lm.model.layers")}
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


def resumed_beside_whole(
    make: Callable[[], spindle.Workload], path: Path, *, steps: int, stop: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters after a run spread over four ranks that two ranks went on with, and after one that never stopped."""
    plans = [spread(make(), 4, 4), widest_plan(spindle.make_metagraph(make()), 2)]
    whole, first, second = make(), make(), make()
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "launcher": "threads"}
    spindle.train(whole, plans[1], steps=steps, **options)
    spindle.train(first, plans[0], steps=stop, checkpoints=path, **options)
    spindle.train(second, plans[1], steps=steps, checkpoints=path, resume=True, **options)
    expected = dict(whole.named_parameters())
    return {name: (value, expected[name]) for name, value in second.named_parameters()}


def test_checkpoints_know_no_layout(tmp_path: Path) -> None:
    """A run spread over four ranks is resumed by two that hold everything, and goes on as one that never stopped."""
    for name, (value, expected) in resumed_beside_whole(workload, tmp_path, steps=5, stop=3).items():
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10, msg=name)


def plainly(made: spindle.Workload, steps: range, states: dict[str, Any]) -> dict[str, Any]:
    """Train in this process by a loop of one's own, from these states of the optimizer; its states afterwards."""
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if n.startswith(f"{c.name}.")], **c.optimizer}
        for c in made.components.values()
    ]
    optimizer = momentum(groups)
    optimizer.state.update({trained[name]: state for name, state in states.items()})
    for step in steps:
        optimizer.zero_grad()
        for task in made.tasks.values():
            torch.autograd.backward(task.function(list(task.batches())[step % 2]))
        optimizer.step()
    return {name: optimizer.state[p] for name, p in trained.items()}


def test_a_layer_unfrozen_later(tmp_path: Path) -> None:
    """Frozen in one layout, it learns from the checkpoint on in another, as in a plain loop; the others keep their
    momentum.
    """
    alone, first, second = (workload(frozen=True) for _ in range(3))
    states = plainly(alone, range(2), {})
    options: dict[str, Any] = {"optimizer": momentum, "launcher": "threads", "checkpoints": tmp_path}
    spindle.train(first, spread(first, 4, 2), steps=2, **options)
    for made in (alone, second):
        made.components["encoder"].module.requires_grad_(True)
    plainly(alone, range(2, 4), states)
    spindle.train(second, spread(second, 4, 4), steps=4, resume=True, **options)
    expected, start = dict(alone.named_parameters()), dict(first.named_parameters())
    for name, value in second.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    assert not torch.equal(start["encoder.layers.1.up.weight"], expected["encoder.layers.1.up.weight"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_plan": None}, "the model has no plan"),
        ({"tensor_plan": {"blocks.*.up": "colwise"}}, "names nothing that can be cut"),
        ({"tensor_plan": {"layers.*.up": "sideways"}}, "the styles there are colwise, rowwise"),
        ({"tensor_plan": {"out": "colwise"}}, "the styles there are colwise_gather_output"),
        ({"tensor_plan": {"out": "colwise_rep"}, "tensor_parallel": 3}, "16 outputs; tensor_parallel must divide"),
        ({"tensor_plan": {"stem": "embedding_rowwise"}}, "only a plain torch.nn.Embedding"),
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


def test_a_cut_parameter_is_read_through_its_layer() -> None:
    """A task that multiplies by the embedding itself would need all of it."""
    made = spindle.Workload("bare")
    lm: Any = made.component("lm", language(), tensor_parallel=4)

    @made.task("bare", batch_size=2, data=[{"tokens": tokens(2, 6, 1)}])
    def bare(batch: dict[str, Tensor]) -> Tensor:
        hidden = lm.model(input_ids=batch["tokens"]).last_hidden_state
        return (hidden @ lm.get_input_embeddings().weight.T).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(WorkloadError, match=r"'lm.model.embed_tokens.weight' is cut .* call the layer"):
        spindle.make_metagraph(made)
