"""Shipping: ranks get the numbers of their own tensors, and no others, whichever way these travel."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import CodeType
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import output_capturing

import spindle
from spindle.capture import capture
from spindle.record.travel import dumped
from spindle.runtime import controller
from spindle.runtime.checkpoints.weights import fill
from spindle.runtime.controller import prepare
from spindle.runtime.launch import shipping
from spindle.runtime.launch.worker_group import packed_spec
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.parallel.layers import Switch, cut_codes
from spindle.runtime.parallel.names import piece_of, put_piece
from spindle.runtime.rank_spec import RankSpec, make_rank_specs, separate
from spindle.runtime.worker import Worker
from tests.random_plans import random_plan
from tests.tiny_workloads import tokens

WORDS = 64
CPU = torch.device("cpu")


def workload(*, tensor_parallel: int = 1, tied: bool = False) -> spindle.Workload:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    found = spindle.Workload("w")
    model = found.component("m", LlamaForCausalLM(config), tensor_parallel=tensor_parallel)
    data = [{"ids": tokens(6, 5, seed=0) % WORDS}]
    found.task("t", batch_size=6, data=data)(lambda b: model(input_ids=b["ids"], labels=b["ids"]).loss)
    return found


def test_models_give_hidden_states_where_they_arrive_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers notes which outputs a class can give when it makes a model of it, which a rank's process never does:
    hidden states were None there.
    """
    found = workload()
    sent = cloudpickle.dumps(Recipe.of(found, capture(found)))
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", type(output_capturing._CAN_RECORD_REGISTRY)())
    model = cloudpickle.loads(sent).skeleton.components["m"].to_empty(device=CPU)
    given = model(input_ids=torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)
    assert len(given.hidden_states) == 4


def specs_of(found: spindle.Workload, seed: int) -> list[RankSpec]:
    prepared = prepare(found, random_plan(spindle.make_metagraph(found), 3, seed))
    return make_rank_specs(prepared.program, prepared.captured, found)


def by_file(specs: list[RankSpec]) -> AbstractContextManager[Any]:
    return shipping.on_this_machine(specs)


def in_specs(specs: list[RankSpec]) -> AbstractContextManager[Any]:
    return nullcontext([shipping.carrying(spec) for spec in specs])


def held(spec: RankSpec) -> dict[str, Tensor]:
    """What a rank has once it has started."""
    codes = cut_codes(spec.codes, spec.cuts, Switch())
    fill(codes.values(), spec.weights, CPU)
    return {n: code.module.get_parameter(inner).detach() for code in codes.values() for inner, n in code.parameters}


@pytest.mark.parametrize("way", [by_file, in_specs])
@pytest.mark.parametrize(("tensor_parallel", "tied"), [(1, False), (2, False), (1, True)])
def test_ranks_hold_the_same_by_every_way(
    way: Callable[[list[RankSpec]], AbstractContextManager[Any]],
    tensor_parallel: int,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tensors as without shipping; in the bytes that are sent no numbers but those that a rank holds."""
    monkeypatch.setattr(shipping, "SMALL_BYTES", 0)
    specs = specs_of(workload(tensor_parallel=tensor_parallel, tied=tied), seed=tensor_parallel)
    with way(specs) as shipped:
        for spec, (light, left) in zip(specs, shipped, strict=True):
            payload = packed_spec(Worker, light, left)
            _, arrived = cloudpickle.loads(payload)
            expected, found = held(separate(spec)), held(arrived)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert len({value.data_ptr() for value in found.values()}) == len(found)
            own = sum(value.nbytes for value in expected.values()) if way is in_specs else 0
            rest = len(packed_spec(Worker, spec, frozenset(map(id, shipping.parameters_of(spec).values()))))
            assert len(payload) < rest + own + 3000 * len(expected)


def test_no_room_for_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then weights travel in the rank specs; nothing stays behind in the folder for temporary files."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shipping, "SMALL_BYTES", 0)
    monkeypatch.setattr(shipping, "write_tensors", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    specs = specs_of(workload(), seed=0)
    with shipping.on_this_machine(specs) as shipped:
        assert [spec for spec, _ in shipped] == specs
        assert not any(left for _, left in shipped)
    assert list(tmp_path.iterdir()) == []


def test_training_by_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that read a file train as threads that share the driver's memory do, and the file goes."""
    monkeypatch.setattr(shipping, "SMALL_BYTES", 0)
    monkeypatch.setattr("spindle.runtime.controller.STREAMED_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    results, weights = [], []
    for launcher in ("threads", "processes"):
        found = workload(tensor_parallel=2)
        plan = random_plan(spindle.make_metagraph(found), 2, 1)
        run = spindle.train(found, plan, optimizer=torch.optim.SGD, steps=2, launcher=launcher)
        results.append(run.losses)
        weights.append([parameter.detach() for _, parameter in found.named_parameters()])
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert [file for file in tmp_path.iterdir() if file.name.startswith("spindle-")] == []


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_trained_weights_come_in_parts(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of all names once, in groups within the limit; of empty tensors and single numbers, too."""
    monkeypatch.setattr(controller, "STREAMED_BYTES", limit)
    shapes = {"a": (3, 5), "none": (0, 4), "b@1/2/0": (7,), "one": (), "c": (2, 2, 2)}
    sizes = {name: (torch.Size(shape), 4 if name != "one" else 8) for name, shape in shapes.items()}
    groups = list(controller._in_groups(sizes))
    assert all(sum((high - low) * sizes[n][1] for n, low, high in group) <= max(limit, 8) for group in groups)
    seen = [(name, number) for group in groups for name, low, high in group for number in range(low, high)]
    assert seen == [(name, number) for name, (shape, _) in sizes.items() for number in range(shape.numel())]
    assert {name for group in groups for name, _, _ in group} == set(shapes)


@pytest.mark.parametrize("name", ["x", "x@1/2/0", "x@2/3/1", "x@1/2/1x3", "x@0/3/1x2"])
def test_pieces_go_where_they_came_from(name: str) -> None:
    """What `piece_of` takes `put_piece` puts back, and nothing else changes."""
    whole = torch.arange(4 * 12.0).reshape(4, 12)
    target, other = whole.clone(), whole.clone()
    piece_of(target, name)
    put_piece(target, name, -piece_of(whole, name).clone())
    assert torch.equal(piece_of(target, name), -piece_of(whole, name))
    put_piece(target, name, piece_of(whole, name).clone())
    assert torch.equal(target, other)


def test_code_arrives_with_the_name_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of calls, which recordings are told apart by, and messages name it; cloudpickle from 3.1.3 on leaves it
    out.
    """
    function = specs_of(workload(), 1)[0].recipe.functions["t"]
    # as the newest does it, whichever is installed
    nameless = cloudpickle.Pickler._dispatch_table[CodeType]
    monkeypatch.setitem(
        cloudpickle.Pickler._dispatch_table, CodeType, lambda code: nameless(code.replace(co_filename="<dynamic-code>"))
    )
    arrived = cloudpickle.loads(dumped(function, [function]))
    assert arrived.__code__.co_filename == function.__code__.co_filename == __file__
