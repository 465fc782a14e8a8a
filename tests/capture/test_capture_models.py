"""Captured models: exact on random plans, split where they can be, and one operator where not."""

import copy
import random
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import LARGE, Captured, capture
from spindle.errors import SpindleError, SpindleWarning, WorkloadError
from tests.capture.capture_models import Branching, Counting, Coupled, Demanding, Experts, Loose, Rotary
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import VOCABULARY, WIDTH, Residual, floats, tokens

Task = Callable[[dict[str, Tensor]], Tensor]
BATCH = 4


def x(*shape: int, seed: int = 0) -> Tensor:
    return floats(BATCH, *shape, seed=seed, dtype=torch.float64)


def wrapped(module: nn.Module, batch: dict[str, Tensor], task: Task, **options: object) -> spindle.Workload:
    torch.manual_seed(1)
    workload = spindle.Workload("w")
    workload.component("m", module.double(), **options)  # type: ignore[arg-type]
    workload.task("t", batch_size=BATCH, data=[batch, {name: value.flip(0) for name, value in batch.items()}])(task)
    return workload


def blocks(captured: Captured) -> list[str]:
    """Operators that are calls of blocks, in order."""
    called = {name for code in captured.tasks.values() for name in code.blocks.values()}
    return [name for name in captured.codes if name in called]


def exact(workload: spindle.Workload) -> None:
    """The widest plan and two random ones agree with one process."""
    metagraph = spindle.make_metagraph(workload)
    for plan in (widest_plan(metagraph, 3), random_plan(metagraph, 2, 0), random_plan(metagraph, 3, 1)):
        report = spindle.verify(workload, plan, launcher="threads")
        assert report.ok, str(report)


def test_masks_and_rotary_tables() -> None:
    """Arguments beside the states: by name, nested, None; made from batch fields and buffers, by every rank itself."""
    model = Rotary()
    batch = {"x": x(6, WIDTH), "lengths": torch.tensor([6, 1, 3, 4])}
    workload = wrapped(model, batch, lambda b: model(b["x"], b["lengths"]).square().mean())
    captured = capture(workload)
    assert blocks(captured) == ["t.m.layers.0", "t.m.layers.1", "t.m.layers.2"]
    assert all(op.splittable for op in captured.graph if not op.name.endswith("loss"))
    assert {len(op.inputs) for op in captured.graph} <= {0, 1}  # tables and mask are computed, not sent
    chains = [len(metaop.operators) for metaop in spindle.make_metagraph(workload)]
    assert sorted(chains) == [1, 1, 1, 2]  # the first layer's states are the batch, so it computes no gradient of them
    exact(workload)


def test_stacks_coupled_layer_by_layer() -> None:
    """Tuples in dataclasses between two stacks: every layer of the second reads its partner's keys and values."""
    model = Coupled()
    batch = {"x": x(3, WIDTH), "y": x(2, WIDTH, seed=1)}
    workload = wrapped(model, batch, lambda b: model(b["x"], b["y"]).square().mean())
    graph = capture(workload).graph
    assert len(blocks(capture(workload))) == 6
    assert all(op.splittable for op in graph if "loss" not in op.name)
    seconds = [op for op in graph if "second" in op.name]
    assert [len(op.inputs) for op in seconds] == [2, 3, 3]  # the first takes its states from the batch
    exact(workload)


def test_buffers_that_change() -> None:
    """Running means of glue and layers are those of the whole batch, once a step."""
    model = Counting()
    workload = wrapped(model, {"x": x(WIDTH)}, lambda b: model(b["x"]).square().mean())
    exact(workload)
    single = Counting()
    reference = wrapped(single, {"x": x(WIDTH)}, lambda b: single(b["x"]).square().mean())
    model.load_state_dict(single.state_dict())
    for one, ranks in ((workload, 3), (reference, 1)):
        plan = widest_plan(spindle.make_metagraph(one), ranks)
        spindle.train(one, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=3, launcher="threads")
    assert int(model.calls) == 3
    torch.testing.assert_close(dict(model.named_buffers()), dict(single.named_buffers()))


def test_tied_weights() -> None:
    """Words in and words out through one matrix: one parameter, its gradient from both ends."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList(Residual(WIDTH) for _ in range(2))
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            y = self.words(ids)
            for block in self.blocks:
                y = block(y)
            logits: Tensor = self.head(y)
            return logits

    model = Tied()
    ids = tokens(BATCH, 5, 0)
    workload = wrapped(
        model, {"ids": ids}, lambda b: F.cross_entropy(model(b["ids"]).flatten(0, 1), b["ids"].flatten())
    )
    named = [name for op in capture(workload).graph for name in (p.name for p in op.parameters)]
    assert named.count("m.words.weight") == 2
    assert "m.head.weight" not in named
    exact(workload)


def test_adapters_of_peft() -> None:
    """LoRA on a frozen language model: adapters get gradients, the rest none, dropout of the adapters included."""
    peft = pytest.importorskip("peft")
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(Qwen2Model(config), settings)
    batch = {"ids": tokens(BATCH, 4, 0)}
    workload = wrapped(model, batch, lambda b: model(input_ids=b["ids"]).last_hidden_state.square().mean())
    captured = capture(workload)
    trained = {p.name for op in captured.graph for p in op.parameters if p.trainable}
    assert len(blocks(captured)) == 2
    assert len({block.kind for block in captured.skeleton.blocks}) == 1  # peft notes in each layer where it stands
    assert len(trained) == 8
    assert all("lora" in name for name in trained)
    exact(workload)


def test_hooks_of_a_first_call_regression() -> None:
    """Models of transformers register hooks in their first call and note so in an attribute. Capture put the attribute
    back and left the hooks, so the next call registered them again and collected each hidden state twice.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=4, patch_size=2)).double()
    fresh = copy.deepcopy(model)

    def penultimate(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = module(pixel_values=batch["x"], output_hidden_states=True).hidden_states[-2]
        return found[:, 1:].square().mean()

    batch = {"x": x(3, 4, 4)}
    workload = wrapped(model, batch, lambda b: penultimate(model, b))
    exact(workload)
    torch.testing.assert_close(penultimate(model, batch), penultimate(fresh, batch))
    assert {len(layer._forward_hooks) for layer in model.encoder.layers} == {1}


# -- what cannot be split ---------------------------------------------------------------------------------------------


def test_a_model_without_blocks_is_one_operator_and_warns() -> None:
    """Nothing repeats, so nothing is cut; it still trains, on several ranks by samples."""
    size = int((LARGE / 2) ** 0.5) + 1
    big = nn.Sequential(nn.Linear(5, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))
    workload = wrapped(big, {"x": x(5)}, lambda b: big(b["x"]).square().mean())
    with pytest.warns(
        SpindleWarning, match=r"'m' has 5\.\d million parameters but no repeated blocks .*layers=\['0', '2', '4'\]"
    ):
        captured = capture(workload)
    assert blocks(captured) == []
    assert [op.splittable for op in captured.graph if op.parameters] == [True]


def test_layers_can_be_named_where_no_rule_finds_them() -> None:
    """By path or as modules; the result is the same."""
    found = []
    for choose in (lambda m: ["first", "second"], lambda m: [m.first, m.second]):
        model = Loose()
        workload = wrapped(model, {"x": x(5)}, _regression(model), layers=choose(model))
        found.append(blocks(capture(workload)))
        exact(workload)
    assert found == [["t.m.first", "t.m.second"]] * 2
    plain = Loose()
    assert blocks(capture(wrapped(plain, {"x": x(5)}, _regression(plain)))) == []


def _regression(model: nn.Module) -> Task:
    return lambda batch: model(batch["x"]).square().mean()


def test_a_component_that_cannot_be_recorded_is_one_operator_and_warns() -> None:
    """A branch on values stops the recording; the component then runs whole, by samples if it does not mix them."""
    model, head = Branching(), nn.Linear(3, 2).double()
    workload = wrapped(model, {"x": x(5)}, lambda b: head(model(b["x"])).square().mean())
    workload.component("head", head)
    message = r"task 't': component 'm' cannot be recorded and runs as one operator: .*in layers= beside 'layers'"
    with pytest.warns(SpindleWarning, match=message):
        captured = capture(workload)
    (whole,) = blocks(captured)
    assert whole == "t.m"
    operator = captured.graph.by_name[whole]
    assert len(operator.parameters) == len(list(model.parameters()))
    assert operator.outputs[0].shape == (BATCH, 3)
    assert operator.forward_flops == 2 * BATCH * (5 * WIDTH + 2 * 4 * WIDTH * WIDTH + 3 * WIDTH)
    exact(workload)


class Looking(nn.Module):
    """Lists of blocks on both sides of a module inside whose own code branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"tower": Branching()})
        self.layers = nn.ModuleList(Residual(3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.visual["tower"](x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_warning_proposes_layers_that_exist_and_help() -> None:
    """What it proposes, taken as written, makes one layer of the module that branches, and keeps the other list."""
    model = Looking()
    task = _regression(model)
    with pytest.warns(SpindleWarning, match="runs as one operator") as caught:
        capture(wrapped(model, {"x": x(5)}, task))
    (message,) = (str(w.message) for w in caught if "one operator" in str(w.message))
    assert "let 'visual.tower', where it runs, be one layer: layers=['layers', 'visual.tower']" in message
    proposed = re.findall(r"'([^']+)'", message.rpartition("layers=")[2])
    workload = wrapped(model, {"x": x(5)}, task, layers=proposed)
    assert blocks(capture(workload)) == ["t.m.visual.tower", "t.m.layers.0", "t.m.layers.1"]
    exact(workload)


def test_a_module_that_holds_all_lists_is_not_proposed_as_one_layer() -> None:
    model = nn.Sequential(Branching(), nn.Identity())
    with pytest.warns(
        SpindleWarning, match="move it into a module of its own and name that in layers= beside '0.layers'"
    ):
        capture(wrapped(model, {"x": x(5)}, _regression(model)))


def test_layers_whose_work_depends_on_values_are_still_layers() -> None:
    """Experts: tensors without numbers cannot run through them, so a few samples show what they give."""
    model = Experts()
    workload = wrapped(model, {"x": x(5)}, _regression(model))
    captured = capture(workload)
    assert blocks(captured) == ["t.m.layers.0", "t.m.layers.1", "t.m.layers.2"]
    assert all(op.splittable for op in captured.graph if "loss" not in op.name)
    exact(workload)


def test_integers_that_a_model_reads() -> None:
    """What depends on the batch alone is computed for real, so a model may read it, and demand what it likes."""
    model = Demanding()
    batch = {"x": x(6, 5), "grid": torch.tensor([[2, 3]] * BATCH)}
    workload = wrapped(model, batch, lambda b: model(b["x"], b["grid"]).square().mean())
    graph = capture(workload).graph
    assert [(op.name, op.splittable) for op in graph] == [("t.m.pre", True), ("t.loss", False)]
    exact(workload)


def test_a_mistake_of_the_user_s_is_told_as_such() -> None:
    """What fails in a plain run too is said with its line, whatever it is."""

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, y: Tensor) -> Tensor:
            z: Tensor = self.linear(y) + torch.zeros(7, dtype=y.dtype)
            return z

    model = Wrong()
    with pytest.raises(
        WorkloadError, match=r"raised RuntimeError while it was recorded, line \d+ of test_capture_models.py: .*Mend"
    ):
        capture(wrapped(model, {"x": x(5)}, _regression(model)))


def test_a_size_that_only_data_tells_is_refused_outside_of_components() -> None:
    """In the task's own code there is no component to take whole."""
    model = nn.Linear(5, 3)

    def task(batch: dict[str, Tensor]) -> Tensor:
        y = model(batch["x"])
        kept: Tensor = y[y[:, 0] > 0]
        return kept.sum()

    message = r"line \d+ of test_capture_models.py: it takes as many rows as a value computed from parameters tells"
    with pytest.raises(WorkloadError, match=message):
        capture(wrapped(model, {"x": x(5)}, task))


def test_a_task_that_names_a_device_is_told_to_leave_it_out() -> None:
    model = nn.Linear(5, 3)

    def task(batch: dict[str, Tensor]) -> Tensor:
        if not torch.cuda.is_available():
            raise RuntimeError("Found no NVIDIA driver on your system.")
        loss: Tensor = model(batch["x"].cuda()).square().mean()
        return loss

    with pytest.raises(WorkloadError, match=r"Leave devices out"):
        capture(wrapped(model, {"x": x(5)}, task))


def test_a_trained_module_that_was_never_registered_is_refused() -> None:
    """Its parameters would be constants, and never change; frozen ones may be."""
    model, extra = nn.Linear(5, 3), nn.Linear(3, 3)

    def task(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = extra(model(batch["x"])).square().mean()
        return loss

    with pytest.raises(WorkloadError, match=r"line \d+ of .* trainable parameter \(3 x 3\) of no component"):
        capture(wrapped(model, {"x": x(5)}, task))
    extra.requires_grad_(False)
    capture(wrapped(model, {"x": x(5)}, task))


def test_modules_that_draw_while_they_are_imported_are_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that draws from `random` once, the first time, is recorded again; one that always does is refused."""
    model = nn.Linear(5, 3)
    drawn: list[float] = []

    def task(batch: dict[str, Tensor]) -> Tensor:
        if len(drawn) < most:
            drawn.append(random.random())
        loss: Tensor = model(batch["x"]).square().mean()
        return loss

    most = 1
    capture(wrapped(model, {"x": x(5)}, task))
    most = 100
    with pytest.raises(WorkloadError, match="draws from random"):
        capture(wrapped(model, {"x": x(5)}, task))


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min, 0.0])
def test_masks_do_not_hide_that_samples_mix(low: float) -> None:
    """However large a mask's entries are, the others are compared as exactly as without."""
    model = nn.Linear(5, 3)

    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = model(batch["x"]).masked_fill(batch["mask"], low)
        y = torch.where(batch["mask"], y, y - 0.1 * torch.where(batch["mask"], 0, y).sum(0)) if mixes else y
        return y.softmax(-1).square().mean()

    for mixes in (True, False):
        workload = wrapped(model, {"x": x(5), "mask": torch.eye(BATCH, 3, dtype=torch.bool)}, task)
        graph = capture(workload).graph
        assert [op.name for op in graph if op.splittable] == ["t.m.pre"]
        handed_on = graph.by_name["t.m.pre"].outputs[0]
        assert (handed_on.shape == (BATCH, 3)) == mixes  # without mixing only one number a sample is left
        exact(workload)


def test_images_among_words_go_by_sample() -> None:
    """masked_scatter fills image places sample by sample, where every sample has as many as it has rows of images."""
    words, sight = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(5, WIDTH)
    both = nn.ModuleDict({"words": words, "sight": sight})
    ids = tokens(BATCH, 6, 0)
    ids[:, 1:3] = 1  # the two places of each image

    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = words(batch["ids"])
        y = y.masked_scatter((batch["ids"] == 1)[..., None].expand_as(y), sight(batch["images"]))
        return y.square().mean()

    workload = wrapped(both, {"ids": ids, "images": x(2, 5)}, task)
    assert all(op.splittable for op in capture(workload).graph if "loss" not in op.name)
    exact(workload)


def _filled(counts: tuple[int, ...], images: Tensor) -> dict[str, Tensor]:
    """Words with `counts` places for images in each sample."""
    ids = tokens(BATCH, 6, 0)
    for sample, count in enumerate(counts):
        ids[sample, :count] = 1
    return {"ids": ids, "images": images}


def _joining(data: list[dict[str, Tensor]], **options: object) -> spindle.Workload:
    words, sight = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(5, WIDTH)
    workload = spindle.Workload("w")
    workload.component("m", nn.ModuleDict({"words": words, "sight": sight}).double())

    @workload.task("t", batch_size=BATCH, data=data, **options)  # type: ignore[arg-type]
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = words(batch["ids"])
        return y.masked_scatter((batch["ids"] == 1)[..., None].expand_as(y), sight(batch["images"])).square().mean()

    return workload


def test_images_among_words_of_other_counts() -> None:
    """Samples may hold any number of images, once rows= says how many: they still go by sample."""
    data = [
        _filled((4, 1, 1, 2), floats(8, 5, seed=1, dtype=torch.float64)),
        _filled((0, 1, 3, 1), floats(5, 5, seed=2, dtype=torch.float64)),
    ]
    workload = _joining(data, rows=lambda batch: {"images": (batch["ids"] == 1).sum(1)})
    assert all(op.splittable for op in capture(workload).graph if "loss" not in op.name)
    exact(workload)


def test_images_that_do_not_fit_their_words_are_refused() -> None:
    """A sample that would take another's image, or leave one of its own, is an error, not another result."""
    message = r"masked_scatter has 4 places for 2 values; samples must have as many values as places: say in rows="
    with pytest.raises(WorkloadError, match=rf"line \d+ of test_capture_models.py: {message}"):
        capture(_joining([_filled((4, 1, 1, 2), x(2, 5))]))
    later = _joining([_filled((2, 2, 2, 2), x(2, 5)), _filled((1, 1, 1, 1), x(2, 5))])
    plan = widest_plan(spindle.make_metagraph(later), 2)
    with pytest.raises(SpindleError, match=r"step 2 .*masked_scatter has [24] places for [48] values"):
        spindle.verify(later, plan, launcher="threads")


def test_a_list_of_samples_put_together_again() -> None:
    """Iterating over a batch and joining the samples does not fix the batch size."""
    model = nn.Linear(5, 3)

    def task(batch: dict[str, Tensor]) -> Tensor:
        y = torch.cat(list(model(batch["x"])), dim=0)
        return y.square().mean()

    workload = wrapped(model, {"x": x(2, 5)}, task)
    assert all(op.splittable for op in capture(workload).graph if "loss" not in op.name)
    exact(workload)
