"""Weights from files: models on the meta device train exactly as the same models in memory, and end in checkpoints."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import spindle
from spindle.errors import CheckpointError, WorkloadError
from spindle.inputs.weights import Weights, header_of, stored_in
from spindle.runtime.checkpoints.tensor_files import Entry, read_tensor, write_tensors
from spindle.values.plan import Plan
from tests.random_plans import random_plan, widest_plan
from tests.refusals import Refusal, check_refusal
from tests.tiny_workloads import WIDTH, Residual, floats, tokens

BATCH, WORDS = 6, 48


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


class Normed(nn.Module):
    """Blocks, buffers of both kinds, a parameter that no task uses, and a frozen one."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.arange(WIDTH) / WIDTH, persistent=False)
        self.register_buffer("shift", torch.arange(WIDTH) / WIDTH)
        self.stem.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x) * self.scale + self.shift)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def on_texts(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = model(input_ids=batch["ids"], labels=batch["ids"]).loss
        return result

    return loss


def on_rows(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda batch: F.cross_entropy(model(batch["x"]), batch["y"])


def workload_of(model: Any, **options: Any) -> spindle.Workload:
    workload = spindle.Workload("w")
    made = workload.component("m", model, **options)
    if isinstance(made, Normed):
        rows = [{"x": floats(BATCH, 5, seed=i, dtype=torch.float32), "y": torch.arange(BATCH) % 3} for i in range(3)]
        workload.task("t", batch_size=BATCH, data=rows)(on_rows(made))
    else:
        texts = [{"ids": tokens(BATCH, 7, seed=i) % WORDS} for i in range(3)]
        workload.task("t", batch_size=BATCH, data=texts)(on_texts(made))
    return workload


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def trained(workload: spindle.Workload, plan: Plan, **options: Any) -> spindle.TrainResult:
    given = {"optimizer": adam, "steps": 2, "launcher": "threads", "timeout_s": 60.0}
    return spindle.train(workload, plan, **{**given, **options})


def state_of(workload: spindle.Workload) -> dict[str, Tensor]:
    every = (*workload.named_parameters(), *workload.named_buffers())
    return {name: value.detach().clone() for name, value in every}


def saved(model: nn.Module, folder: Path, shard: str | None = None) -> Path:
    if isinstance(model, LlamaForCausalLM):
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    else:
        folder.mkdir()
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
        )
    return folder


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "in several files": (llama, {"shard": "10KB"}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "cut by tensor parallelism": (llama, {"tensor_parallel": 2}),
    "in bf16 files": (llama, {"dtype": torch.bfloat16}),
    "with buffers": (Normed, {}),
}


@pytest.mark.parametrize(("case", "num_ranks"), [(case, 2 + number % 2) for number, case in enumerate(CASES)])
def test_training_from_files_is_training_in_memory(case: str, num_ranks: int, tmp_path: Path) -> None:
    """Losses and trained weights are equal, bit for bit; so is what a second run goes on from."""
    build, options = CASES[case]
    cut = {"tensor_parallel": options["tensor_parallel"]} if "tensor_parallel" in options else {}
    torch.manual_seed(3)
    model = build()
    if "dtype" in options:  # numbers that the narrower type holds; buffers are no such
        for parameter in model.parameters():
            parameter.data = parameter.data.to(options["dtype"]).float()
        saved(copy.deepcopy(model).to(options["dtype"]), tmp_path / "files")
    else:
        saved(model, tmp_path / "files", options.get("shard"))
    here = workload_of(model, **cut)
    there = workload_of(lambda: build(), weights=tmp_path / "files", **cut)
    plan = widest_plan(spindle.make_metagraph(here), num_ranks)
    if not cut:
        plan = random_plan(spindle.make_metagraph(here), num_ranks, 1)
    expected = trained(here, plan, checkpoints=tmp_path / "here")
    found = trained(there, plan, checkpoints=tmp_path / "there")
    assert found.losses == expected.losses
    assert all(parameter.is_meta for _, parameter in there.named_parameters())
    held = {name: value for name, value in state_of(here).items() if not name.endswith("scale")}
    other = workload_of(build(), **cut)
    assert found.checkpoint is not None
    spindle.load_checkpoint(other, found.checkpoint)
    after = state_of(other)
    assert [name for name in held if not torch.equal(held[name], after[name])] == []

    more = {"steps": 3, "resume": True}
    again = random_plan(spindle.make_metagraph(there), 2, 5)
    losses = [
        trained(each, again, checkpoints=tmp_path / name, **more).losses
        for each, name in ((here, "here"), (there, "there"))
    ]
    assert losses[0] == losses[1]


def test_processes_read_their_own(tmp_path: Path) -> None:
    """Ranks as processes open the files themselves; a component that is cut is read in pieces."""
    model = llama()
    saved(model, tmp_path / "files")
    here = workload_of(model, tensor_parallel=2)
    with torch.device("meta"):
        empty = llama()
    there = workload_of(empty, weights=tmp_path / "files", tensor_parallel=2)
    plan = random_plan(spindle.make_metagraph(here), 3, 2)
    options: dict[str, Any] = {"launcher": "processes"}
    expected = trained(here, plan, **options)
    found = trained(there, plan, checkpoints=tmp_path / "run", **options)
    assert found.losses == expected.losses


def test_exported_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to files: what transformers loads is what was trained, though this process held none of it."""
    monkeypatch.setattr("spindle.runtime.checkpoints.export.FILE_BYTES", 8_000)
    model = llama(tie_word_embeddings=True)
    saved(model, tmp_path / "files")
    there = workload_of(lambda: llama(tie_word_embeddings=True), weights=tmp_path / "files")
    plan = random_plan(spindle.make_metagraph(there), 2, 3)
    result = trained(there, plan, checkpoints=tmp_path / "run")
    assert result.checkpoint is not None
    folder = spindle.export(there, tmp_path / "out", checkpoint=result.checkpoint)["m"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = LlamaForCausalLM.from_pretrained(folder)
    other = workload_of(llama(tie_word_embeddings=True))
    spindle.load_checkpoint(other, result.checkpoint)
    expected = dict(other.components["m"].module.state_dict())
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_part_of_another_models_files(tmp_path: Path) -> None:
    """`prefix` takes some keys, `rename` gives others the module's names or leaves them out."""
    model = Normed()
    files = {f"net.{name.replace('stem', 'first')}": value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "files").mkdir()
    save_file(
        {**files, "other.weight": torch.zeros(2), "net.extra": torch.zeros(2)}, tmp_path / "files" / "all.safetensors"
    )

    def rename(key: str) -> str | None:
        return None if key == "extra" else key.replace("first", "stem")

    given = Weights(tmp_path / "files", prefix="net.", rename=rename)
    there, here = workload_of(lambda: Normed(), weights=given), workload_of(model)
    plan = random_plan(spindle.make_metagraph(here), 2, 0)
    assert trained(there, plan, checkpoints=tmp_path / "run").losses == trained(here, plan).losses


def test_what_is_in_memory_stays_the_users(tmp_path: Path) -> None:
    """A new head beside a model from files: the head's weights come back, the rest goes to the checkpoint."""

    class WithHead(nn.Module):
        def __init__(self, inner: Normed) -> None:
            super().__init__()
            self.inner, self.layers = inner, inner.layers
            self.new = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.new(self.inner(x))
            return y

    inner = Normed()
    folder = saved(inner, tmp_path / "files")
    rows = [{"x": floats(BATCH, 5, seed=0, dtype=torch.float32), "y": torch.arange(BATCH) % 3}]
    empty = spindle.Workload("e").component("m", lambda: Normed())
    new, losses = [], []
    for body, weights in ((inner, None), (empty, Weights(folder, rename=lambda key: f"inner.{key}"))):
        torch.manual_seed(7)
        model = WithHead(body)
        workload = spindle.Workload("w")
        workload.component("m", model, weights=weights)
        workload.task("t", batch_size=BATCH, data=rows)(on_rows(model))
        plan = random_plan(spindle.make_metagraph(workload), 2, 0)
        losses.append(trained(workload, plan, checkpoints=tmp_path / str(weights is None)).losses)
        new.append(model.new.weight.detach())
    assert losses[0] == losses[1]
    assert torch.equal(*new)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 6), (3, 12, 2), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_pieces_are_read_alone(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Any piece along any dimension, of one tensor or of several packed ones, is the piece of the whole."""
    from spindle.runtime.parallel.names import piece_of

    whole = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"other": Entry.of(torch.ones(3)), "x": Entry.of(whole)})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], whole)
    stored = header_of(tmp_path / "a.safetensors")["x"]
    assert torch.equal(read_tensor(stored), whole)
    for dim, size in enumerate(shape):
        for count, packs in ((2, 1), (3, 1), (2, 3), (3, 2)):
            for index in range(count if size and size % (count * packs) == 0 else 0):
                name = f"x@{index}/{count}/{dim}" + (f"x{packs}" if packs > 1 else "")
                assert torch.equal(read_tensor(stored, name), piece_of(whole, name)), name


def folder_of(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(change: Callable[[dict[str, Tensor]], None], tmp_path: Path, **options: Any) -> None:
    tensors = {name: value.clone() for name, value in Normed().state_dict().items()}
    change(tensors)
    workload = workload_of(lambda: Normed(), weights=Weights(folder_of(tensors, tmp_path), **options))
    trained(workload, random_plan(spindle.make_metagraph(workload), 2, 0), checkpoints=tmp_path / "run")


def ends_short(tmp_path: Path) -> None:
    folder = folder_of({name: value.clone() for name, value in Normed().state_dict().items()}, tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(os.path.getsize(file.name) - 1)
    stored_in(folder)


def tied_apart(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    folder = saved(model, tmp_path / "files")
    workload = workload_of(lambda: llama(tie_word_embeddings=True), weights=folder)
    spindle.make_metagraph(workload)


def without(tmp_path: Path, **options: Any) -> None:
    workload = workload_of(lambda: Normed(), **options)
    trained(workload, random_plan(spindle.make_metagraph(workload), 2, 0), checkpoints=tmp_path / "run")


def without_checkpoints(tmp_path: Path) -> None:
    folder = saved(Normed(), tmp_path / "files")
    workload = workload_of(lambda: Normed(), weights=folder)
    trained(workload, random_plan(spindle.make_metagraph(workload), 2, 0))


def indexed_outside(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    stored_in(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    """Before ranks start, in a sentence that names component, key and file."""
    new = torch.zeros(2)
    table: dict[str, Refusal] = {
        "a missing key": (
            lambda: refused(lambda t: t.__delitem__("stem.weight"), tmp_path),
            "'stem.weight'",
            "lacks",
            "prefix= or rename=",
        ),
        "a surplus key": (
            lambda: refused(lambda t: t.update(more=new), tmp_path),
            "'more'",
            "which the module does not have",
            "rename={KEY: None}",
        ),
        "another shape": (
            lambda: refused(lambda t: t.update({"head.bias": new}), tmp_path),
            "'head.bias' is (3,)",
            "(2,) in",
            "config",
        ),
        "a wider type": (
            lambda: refused(lambda t: t.update({"head.bias": t["head.bias"].double()}), tmp_path),
            "float64",
            "cannot hold exactly",
            "build the module in float64",
        ),
        "two keys for one": (
            lambda: refused(lambda t: t.update({"old": t["head.bias"].clone()}), tmp_path, rename={"old": "head.bias"}),
            "both become 'head.bias'",
            "'old'",
            "correct rename=",
        ),
        "no weights": (lambda: without(tmp_path), "component 'm'", "nothing tells where", "weights=FOLDER"),
        "no folder": (
            lambda: without(tmp_path, weights=tmp_path / "none"),
            "none'",
            "is no folder on this machine",
            "save_pretrained",
        ),
        "an empty folder": (
            lambda: without(tmp_path, weights=tmp_path),
            "holds no model.safetensors",
            "no index of several",
            "save_pretrained",
        ),
        "no place to go": (
            lambda: without_checkpoints(tmp_path / "a"),
            "component 'm'",
            "cannot hold its trained weights",
            "checkpoints=FOLDER",
        ),
        "a short file": (lambda: ends_short(tmp_path), "model.safetensors", "cut short", "fetch or write it again"),
        "two for tied ones": (lambda: tied_apart(tmp_path / "b"), "lm_head.weight", "two different ones", "rename="),
        "a path that leaves": (lambda: indexed_outside(tmp_path), "'../b.safetensors'", "outside", "write it again"),
        "weights in memory, too": (
            lambda: in_memory(tmp_path),
            "has values of its own",
            "stands in",
            "meta device",
        ),
        "one process": (
            lambda: spindle.verify(workload_of(lambda: Normed())),
            "component 'm'",
            "one process",
            "smaller",
        ),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for refusal in table.values():
        check_refusal(refusal, WorkloadError)


def in_memory(tmp_path: Path) -> None:
    model = Normed()
    workload = workload_of(model, weights=folder_of(dict(model.state_dict()), tmp_path))
    spindle.make_metagraph(workload)


def test_export_asks_for_a_checkpoint(tmp_path: Path) -> None:
    """Nothing else holds the weights of a module on the meta device."""
    workload = workload_of(lambda: Normed())
    attempt = (lambda: spindle.export(workload, tmp_path), "component 'm'", "in no checkpoint", "give checkpoint=")
    check_refusal(attempt, CheckpointError)
