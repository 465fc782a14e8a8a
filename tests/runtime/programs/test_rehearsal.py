"""LayerBench: layers taken out of a step compute what they compute in it, whatever they keep."""

import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from spindle.capture import Captured, capture
from spindle.capture.codes import OperatorCode
from spindle.record.substitutes.draws import Stream, drawing_from
from spindle.runtime.comms.transport import ThreadTransport
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.parallel.names import joined_pieces
from spindle.runtime.profiling.layer_bench import LayerBench
from spindle.runtime.profiling.rounds import counts_to_measure, kinds_of
from spindle.runtime.programs.text import dumps, loads
from spindle.values.contract import contract
from spindle.workload import Workload
from tests.tiny_workloads import cut_language_model, encoder_decoder, five_families, frozen_tower, in_place, two_towers

WORKLOADS: tuple[Callable[[], Workload], ...] = (
    two_towers,
    frozen_tower,
    encoder_decoder,
    in_place,
    five_families,
)


@functools.cache
def captured(make: Callable[[], Workload]) -> tuple[Workload, Captured]:
    workload = make()
    return workload, capture(workload)


def rehearsals(make: Callable[[], Workload]) -> Iterator[tuple[LayerBench, dict[str, OperatorCode]]]:
    """Layers of each kind on each count up to three, and their codes as they were."""
    workload, found = captured(make)
    for kind in kinds_of(contract(found.graph)).values():
        task = workload.tasks[kind.operators[0].task]
        batch, recipe = task.sampled(task.first_batch()), Recipe.of(workload, found)
        for count in counts_to_measure(kind.limit, 3):
            codes = copy.deepcopy({name: found.codes[name] for name in kind.names})
            yield LayerBench(found, recipe, kind.names, batch, count, torch.device("cpu")), codes


def plain_gradients(layers: LayerBench, codes: dict[str, OperatorCode]) -> dict[str, Tensor]:
    """Gradients of the layers' parameters by torch alone, from the same inputs and gradients."""
    specs = layers.executors[False].program.tensor_by_name
    values = {name: v.clone().requires_grad_(specs[name].needs_grad) for name, v in layers.given.items()}
    bounds, loaded = layers.executors[False].program.slices[0].bounds[0], layers.loaded[False]
    for code in codes.values():
        arguments = [values[name] for name in code.inputs]
        with drawing_from(layers.executors[False].ready["s0"].stream(Stream(), 0, loaded.batch.units, bounds)):
            found = code.module(loaded.part(bounds).operators[code.name], *arguments)
        values.update(zip(code.outputs, found, strict=True))
    losses = [tensor for _, tensor in layers.executors[False].program.losses]
    ends = [values[name] for name in (*layers.wanted, *losses)]
    if layers.goes_back:
        torch.autograd.backward(ends, [*layers.wanted.values(), *(torch.ones(()).to(values[n]) for n in losses)])
    return {
        name: parameter.grad
        for code in codes.values()
        for inner, name in code.parameters
        if (parameter := code.module.get_parameter(inner)).grad is not None
    }


@pytest.mark.parametrize("make", WORKLOADS)
def test_gradients_are_those_of_torch_alone(make: Callable[[], Workload]) -> None:
    """With activations kept, and computed again."""
    backwards = 0
    for layers, codes in rehearsals(make):
        wanted: dict[str, Tensor] = {}
        for recompute in (False, True):
            layers.begin(recompute=recompute)
            layers.forward()
            layers.backward()
            wanted = wanted or plain_gradients(layers, codes)
            got = {n: p.grad for n, p in layers.store.parameters.items() if p.grad is not None and p.grad.any()}
            for name, gradient in wanted.items():
                torch.testing.assert_close(got.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-9, atol=1e-9)
            assert got.keys() <= wanted.keys()
            assert layers.goes_back == bool(layers.wanted or layers.executors[False].program.losses)
            backwards += bool(got)
            layers.store.zero_gradients()
    assert backwards


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_two_ranks_that_hold_a_copy_between_them_have_its_gradients(count: int, recompute: bool) -> None:
    """Pieces side by side, shares added up; on the first half of the batch where two copies share it."""
    workload, found = captured(cut_language_model)
    kinds = [kind for kind in kinds_of(contract(found.graph)).values() if kind.parts == 2]
    assert len(kinds) >= 3
    for kind in kinds:
        task = workload.tasks["t"]
        batch, recipe = task.sampled(task.first_batch()), Recipe.of(workload, found)
        ranks = [
            LayerBench(found, recipe, kind.names, batch, count, torch.device("cpu"), (transport, (0, 1)))
            for transport in ThreadTransport.connect(2, timeout_s=20.0)
        ]
        ranks[1].given, ranks[1].wanted = ranks[0].given, ranks[0].wanted

        def run(layers: LayerBench) -> dict[str, Tensor]:
            layers.begin(recompute=recompute)
            layers.forward()
            layers.backward()
            return {name: p.grad for name, p in layers.store.parameters.items() if p.grad is not None}

        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(run, ranks)
        shares = {n: [own[n] for own in (first, second) if n in own] for n in first | second}
        got = joined_pieces({name: torch.stack(parts).sum(0) for name, parts in shares.items()})
        wanted = plain_gradients(ranks[0], copy.deepcopy({name: found.codes[name] for name in kind.names}))
        assert wanted
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_again_is_the_same_again(recompute: bool) -> None:
    """Nothing of an earlier time is left once gradients are cleared, not even in buffers of the executor."""
    for layers, _ in rehearsals(two_towers):
        found: list[list[Tensor]] = []
        for _ in range(2):
            layers.begin(recompute=recompute)
            layers.forward()
            layers.backward()
            found.append([p.grad.clone() for p in layers.trained.values() if p.grad is not None])
            layers.store.zero_gradients()
        assert len(found[0]) == len(layers.trained)
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("make", WORKLOADS)
def test_an_excerpt_is_a_program_like_any(make: Callable[[], Workload]) -> None:
    """It prints and parses back; with `recompute` each layer is a run of its own."""
    for layers, codes in rehearsals(make):
        whole, each = (layers.executors[recompute].program for recompute in (False, True))
        for program in (whole, each):
            assert loads(dumps(program)) == program
        assert [run.operators for run in whole.slices] == [(), tuple(codes), ()]
        assert [run.operators for run in each.slices] == [(), *((name,) for name in codes), ()]
