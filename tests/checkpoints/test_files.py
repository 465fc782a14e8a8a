"""Checkpoints as files: read back under the user's names, and refused when they are not what was written."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

import spindle
from spindle.errors import CheckpointError
from spindle.runtime.checkpoints.checkpoint import read
from tests.checkpoints.test_resume import towers, trained, weights
from tests.random_plans import widest_plan
from tests.tiny_workloads import HandWritten, clip_vision


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two steps of two ranks."""
    workload = towers()
    trained(workload, widest_plan(spindle.make_metagraph(workload), 2), 2, checkpoints=tmp_path)
    return tmp_path / "step-00000002"


def test_weights_bear_the_users_names(checkpoint: Path) -> None:
    """Any safetensors reader finds them; parameters come first, then optimizer states with their key."""
    held = load_file(next(checkpoint.glob("*.safetensors")))
    expected = set(weights(towers()))
    assert {name for name in held if ":" not in name} == expected
    states = {name for name in held if ":" in name}
    stepped = {name for name in expected if not name.startswith("unused.")}
    assert states == {f"optimizer:{name}:{key}" for name in stepped for key in ("step", "exp_avg", "exp_avg_sq")}


def test_weights_come_back(checkpoint: Path) -> None:
    """`load_checkpoint` fills the user's modules and tells the steps."""
    workload = towers()
    assert spindle.load_checkpoint(workload, checkpoint) == 2
    held = load_file(next(checkpoint.glob("*.safetensors")))
    assert all(torch.equal(held[name], value) for name, value in weights(workload).items())


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm-was-done"),))


def truncated(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def flipped(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def without_a_file(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def without_itself(path: Path) -> None:
    (path / "spindle.json").unlink()


def cut_json(path: Path) -> None:
    (path / "spindle.json").write_text((path / "spindle.json").read_text()[:40])


def another_version(path: Path) -> None:
    edit(path, version=4)


def unknown_field(path: Path) -> None:
    edit(path, color="red")


def path_outside(path: Path) -> None:
    edit(path, files={"../secret": [1, 2]})


def another_step(path: Path) -> None:
    edit(path, step=7)


def another_seed(path: Path) -> None:
    edit(path, seed=7)


def edit(path: Path, *, signed: bool = False, **values: Any) -> None:
    """`signed`: with a checksum that fits."""
    about = json.loads((path / "spindle.json").read_text()) | values
    if signed:
        text = json.dumps(about | {"checksum": ""}, separators=(",", ":"))
        about["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "spindle.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "changed or cut short"),
        (flipped, "changed or cut short"),
        (without_a_file, "missing"),
        (without_itself, "is no checkpoint"),
        (cut_json, "cannot be read"),
        (another_version, "is of version 4 and this Spindle reads 3"),
        (unknown_field, "Extra inputs"),
        (path_outside, "'../secret', which is no file of this folder"),
        (another_step, "is not as it was written"),
        (another_seed, "is not as it was written"),
    ],
)
def test_what_is_not_as_written_is_refused(checkpoint: Path, damage: Any, said: str) -> None:
    """The message names the file and what to do; the model stays as it was."""
    damage(checkpoint)
    workload = towers()
    before = weights(workload)
    with pytest.raises(CheckpointError, match=said):
        spindle.load_checkpoint(workload, checkpoint)
    assert all(torch.equal(before[name], value) for name, value in weights(workload).items())


def test_processes_that_resume_together_check_each_file_once(checkpoint: Path) -> None:
    """Whichever file was changed, one of two processes finds it; the other does not read it."""
    files = sorted(json.loads((checkpoint / "spindle.json").read_text())["files"])
    assert len(files) >= 2
    for index, name in enumerate(files):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name} is not the file that was written"):
            read(checkpoint, (index % 2, 2))
        (checkpoint / name).write_bytes(whole)
        assert read(checkpoint, (index % 2, 2)).step == 2
        if name != "progress.pt":  # which each of them needs
            (checkpoint / name).write_bytes(b"")
            assert read(checkpoint, (1 - index % 2, 2)).step == 2
            (checkpoint / name).write_bytes(whole)


def test_nothing_is_unpickled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint that someone was sent runs no code, even where its checksums were made to fit."""
    import zlib

    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Harmful())
    (checkpoint / "progress.pt").write_bytes(data)
    files = json.loads((checkpoint / "spindle.json").read_text())["files"]
    edit(checkpoint, signed=True, files=files | {"progress.pt": [len(data), zlib.crc32(data)]})
    with pytest.raises(CheckpointError, match="more than plain values"):
        spindle.load_checkpoint(towers(), checkpoint)
    assert not (tmp_path / "harm-was-done").exists()


def test_another_model_is_refused(checkpoint: Path) -> None:
    """A layer more, or a wider one, is named."""
    for inputs, depth, said in ((5, 4, "has no 'left.blocks.3"), (6, 3, "'left.stem.weight' is")):
        workload = spindle.Workload("other")
        workload.component("unused", HandWritten(2, depth=1).double())
        workload.component("left", HandWritten(inputs, depth=depth).double())
        workload.component("right", HandWritten(4, depth=2).double())
        with pytest.raises(CheckpointError, match=said):
            spindle.load_checkpoint(workload, checkpoint)


def test_export_is_what_other_tools_load(tmp_path: Path) -> None:
    """A transformers model goes out by `save_pretrained`, any other as safetensors; both load again."""
    workload = spindle.Workload("out")
    vision: nn.Module = workload.component("vision", clip_vision())
    own = workload.component("own", HandWritten())
    written = spindle.export(workload, tmp_path)
    again: nn.Module = CLIPVisionModelWithProjection.from_pretrained(written["vision"])
    held: dict[str, Tensor] = load_file(written["own"] / "model.safetensors")
    for ours, theirs in ((vision.state_dict(), again.state_dict()), (own.state_dict(), held)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
