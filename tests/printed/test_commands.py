"""What each command prints when all is well, or when what it checked is wrong: text, JSON, exit code."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from spindle.files.formats import read
from spindle.values.plan import Plan
from spindle.values.profile import Profile
from spindle.values.trace import Trace
from tests.printed.conftest import Outcome, Spindle
from tests.printed.samples import MODEL, SPEC, metagraph_file

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metagraph_file(tmp_path / "graph.json")
    (tmp_path / "small.yaml").write_text(SPEC)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def one_object(done: Outcome) -> dict[str, Any]:
    """The one JSON object on stdout; numbers that JSON does not have are refused."""

    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    found: dict[str, Any] = json.loads(done.out, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


# -- plan, check, show ------------------------------------------------------------------------------------------------


def test_a_plan_as_text(folder: Path, spindle_command: Spindle) -> None:
    """Chart, legend, summary, costs and slices of two MetaOps on two devices, in full."""
    done = spindle_command("plan", "graph.json", "--cluster", "1x2", "--method", "paper", "--table", "-o", "plan.json")
    text = re.sub(r"planned in \d+\.\d+ s", "planned in 0.00 s", done.out)
    path = GOLDEN / "small.plan.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert (done.code, done.err) == (0, "")
    assert max(map(len, text.splitlines())) <= 120


def test_a_plan_as_json(folder: Path, spindle_command: Spindle) -> None:
    """The object is the plan itself: what is printed is what is written."""
    done = spindle_command("plan", "graph.json", "--cluster", "1x2", "--json", "-o", "plan.json")
    found = one_object(done)
    assert (done.code, found["format"], found["version"]) == (0, "spindle.plan", 1)
    assert found == json.loads((folder / "plan.json").read_text())
    assert read(folder / "plan.json", Plan).num_devices == 2


def test_a_plan_begun_from_another_and_pinned(folder: Path, spindle_command: Spindle) -> None:
    """`--start` takes a former plan's file; what `--pin` names runs on just these devices, and the plan is sound."""
    assert spindle_command("plan", "small.yaml", "-c", "1x4", "-o", "former.json").code == 0
    metaop = read("former.json", Plan).slices[0].metaop
    done = spindle_command(
        "plan", "small.yaml", "-c", "1x4", "--start", "former.json", "--pin", f"{metaop}=2", "-o", "pinned.json"
    )
    assert done.code == 0, done.err
    assert {s.devices for s in read("pinned.json", Plan) if s.metaop == metaop} == {(2,)}
    assert spindle_command("check", "pinned.json").code == 0


@pytest.mark.parametrize("pin", ["vision", "vision=", "=1", "vision=a", "vision=1-2-3", "vision=1,,2"])
def test_pins_that_cannot_be_read(folder: Path, spindle_command: Spindle, pin: str) -> None:
    """The message shows how."""
    done = spindle_command("plan", "small.yaml", "-c", "1x4", "--pin", pin)
    assert done.code == 2
    assert "is not NAME=DEVICES, for instance vision=0-3" in done.err


def test_a_sound_plan_passes(folder: Path, spindle_command: Spindle) -> None:
    spindle_command("plan", "graph.json", "--cluster", "1x2", "-o", "plan.json")
    done = spindle_command("check", "plan.json")
    assert done.code == 0
    assert done.out == "plan.json: keeps all rules and costs; makespan 0.500000 s, 2 slices\n"
    assert one_object(spindle_command("check", "plan.json", "--json")) == {"ok": True, "findings": []}


def test_a_plan_is_checked_against_another_metagraph(folder: Path, spindle_command: Spindle) -> None:
    """A plan that keeps its own rules breaks those of a MetaGraph with slower layers."""
    spindle_command("plan", "graph.json", "--cluster", "1x2", "-o", "plan.json")
    metagraph_file(folder / "slow.json", lambda data: data["metaops"][1].update(layer_time_s={"1": 0.9}))
    done = spindle_command("check", "plan.json", "--metagraph", "slow.json")
    assert done.code == 1
    assert "t.loss" in done.out
    found = one_object(spindle_command("check", "plan.json", "--metagraph", "slow.json", "--json"))
    assert found["ok"] is False
    assert any("t.loss" in finding for finding in found["findings"])


def test_the_picture_of_a_broken_plan_points_at_the_slice(folder: Path, spindle_command: Spindle) -> None:
    spindle_command("plan", "graph.json", "--cluster", "1x2", "-o", "plan.json")
    broken = json.loads((folder / "plan.json").read_text())
    broken["waves"][1]["slices"][0]["start_s"] = 0.05  # the loss starts while the tower runs
    (folder / "plan.json").write_text(json.dumps(broken))
    done = spindle_command("check", "plan.json")
    assert done.code == 1
    assert any("t.loss" in line and "<-- here" in line for line in done.out.splitlines())


def test_a_model_that_cannot_fit_is_infeasible_on_one_device_only(folder: Path, spindle_command: Spindle) -> None:
    """Exit 3, and 0 on the cluster that the message asks for."""
    metagraph_file(folder / "big.json", lambda data: data["metaops"][0].update(memory_bytes={"1": 1e12, "2": 1e10}))
    assert spindle_command("plan", "big.json", "--cluster", "1x1").code == 3
    assert spindle_command("plan", "big.json", "--cluster", "1x2").code == 0


def test_infeasible_leaves_stdout_empty(folder: Path, spindle_command: Spindle) -> None:
    """A program that reads JSON gets an exit code, and nothing to misread; no file is written."""
    metagraph_file(folder / "big.json", lambda data: data["metaops"][0].update(memory_bytes={"1": 1e15, "2": 1e15}))
    done = spindle_command("plan", "big.json", "--cluster", "1x2", "--json", "-o", "plan.json")
    assert (done.code, done.out) == (3, "")
    assert not (folder / "plan.json").exists()


def test_show_writes_what_it_is_asked_for(folder: Path, spindle_command: Spindle) -> None:
    spindle_command("plan", "graph.json", "--cluster", "1x2", "-o", "plan.json")
    shown = spindle_command("show", "plan.json")
    assert shown.code == 0
    assert shown.out.startswith("          0")
    done = spindle_command(
        "show", "plan.json", "--html", "p.html", "--svg", "p.svg", "--png", "p.png", "--chrome", "p.json"
    )
    assert done.out == "written to p.html, p.svg, p.png, p.json\n"
    assert "<html" in (folder / "p.html").read_text()
    assert (folder / "p.svg").read_text().startswith("<svg")
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "p.json").read_text())["traceEvents"]


def test_show_as_json(folder: Path, spindle_command: Spindle) -> None:
    """The figures of the page, and the files that were written beside them."""
    spindle_command("plan", "graph.json", "--cluster", "1x2", "-o", "plan.json")
    done = spindle_command("show", "plan.json", "--svg", "p.svg", "--json")
    found = one_object(done)
    assert (done.code, found["written"], found["num_devices"]) == (0, ["p.svg"], 2)
    assert [len(view["devices"]) for view in found["views"]] == [2]
    assert (folder / "p.svg").read_text().startswith("<svg")


def test_a_spec_is_planned(folder: Path, spindle_command: Spindle) -> None:
    """Its costs are predicted, and the text says so."""
    done = spindle_command("plan", "small.yaml", "--cluster", "1x2:a100-80g")
    assert done.code == 0
    assert "costs " in done.out
    assert "s a step: nine of ten measured steps lay so near to predicted costs" in " ".join(done.out.split())


# -- models -----------------------------------------------------------------------------------------------------------


def test_profile_then_plan(folder: Path, spindle_command: Spindle) -> None:
    """Times measured here are what the plan is then made of."""
    found = one_object(spindle_command("profile", "model.py", "-o", "profile.json", "--devices", "2", "--json"))
    profile = read(folder / "profile.json", Profile)
    assert found == {
        "output": "profile.json",
        "device": profile.device,
        "kinds": len(profile.by_kind),
        "entries": len(profile.entries),
        "messages": len(profile.links),
        "new": profile.size,
    }
    done = spindle_command("plan", "model.py", "--cluster", "1x2:cpu", "--profile", "profile.json")
    assert done.code == 0
    assert "measured" in done.out
    assert "holds no times" not in done.out
    (folder / "other.py").write_text(
        "import torch, spindle\nworkload = spindle.Workload('other', precision='bf16')\n"
        "net = workload.component('net', torch.nn.Conv1d(3, 3, 1))\n"
        "@workload.task('t', batch_size=2, data=[{'x': torch.ones(2, 3, 4)}])\n"
        "def t(batch):\n    return net(batch['x']).square().mean()\n"
    )
    done = spindle_command("plan", "other.py", "--cluster", "1x2:cpu", "--profile", "profile.json")
    assert "profile    holds no times of these operators" in done.out


def test_verify_agrees(folder: Path, spindle_command: Spindle) -> None:
    done = spindle_command("verify", "model.py", "--launcher", "threads", "--steps", "1", "--json")
    found = one_object(done)
    assert (done.code, done.err, found["ok"]) == (0, "", True)
    assert set(found) >= {"ok", "max_abs_error", "max_rel_error", "losses", "reference_losses", "rows"}
    assert {row["quantity"] for row in found["rows"]} == {"loss", "gradient", "parameter", "rate"}


def test_verify_finds_a_difference(folder: Path, spindle_command: Spindle) -> None:
    """Data that are others in each pass do not repeat themselves; exit 1, with the first rows that differ."""
    options = ("model.py:drifting", "--launcher", "threads", "--workers", "1")
    done = spindle_command("verify", *options)
    assert done.code == 1
    assert done.out.startswith("parity: DIFFERS from one process")
    assert one_object(spindle_command("verify", *options, "--json"))["ok"] is False


def test_verify_takes_what_train_takes(folder: Path, spindle_command: Spindle) -> None:
    """The file's optimizer, schedule and metric are used, over a resume too; what cannot step is refused."""
    stepped = (folder / "model.py").read_text() + (
        "def optimizer(named_parameters):\n    return torch.optim.AdamW(named_parameters, lr=0.1)\n"
        "scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau\n"
    )
    (folder / "stepped.py").write_text(stepped + "def metric(losses):\n    return losses['t']\n")
    options = ("--launcher", "threads", "--steps", "4", "--resume-under", "1")
    done = spindle_command("verify", "stepped.py", *options)
    assert done.code == 0
    assert "2 parameters, 6 optimizer states, 1 learning" in done.out
    (folder / "stepped.py").write_text(stepped)
    refused = spindle_command("verify", "stepped.py", *options)
    assert (refused.code, refused.out) == (2, "")
    assert "ReduceLROnPlateau needs a number in each step; give metric=" in refused.err


def test_train(folder: Path, spindle_command: Spindle) -> None:
    """One JSON object with a loss for each step and task; the trace bears the program's names."""
    options = ("--steps", "3", "--launcher", "threads", "--trace", "trace.json", "--lr", "0.1")
    done = spindle_command("train", "model.py:factory", *options, "--json")
    found = one_object(done)
    assert (done.code, found["steps"]) == (0, 3)
    losses = [step["t"] for step in found["losses"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    trace = read(folder / "trace.json", Trace)
    assert {"LOAD t", "FORWARD s0", "STEP"} <= {span.name for span in trace}


def test_numbers_that_json_does_not_have(folder: Path, spindle_command: Spindle) -> None:
    """A loss that has overflowed is null; the object stays one that any parser reads."""
    options = ("model.py:overflowing", "--steps", "1", "--launcher", "threads", "--json")
    trained = spindle_command("train", *options, "--not-finite", "ignore")
    assert (trained.code, one_object(trained)["losses"]) == (0, [{"t": None}])
    verified = spindle_command("verify", *options)
    assert (verified.code, one_object(verified)["ok"]) == (0, True)  # it is the same in one process


def test_losses_that_are_no_numbers_are_said(folder: Path, spindle_command: Spindle) -> None:
    """The run ends with them, unless it is to go on to its end."""
    options = ("train", "model.py:overflowing", "--steps", "2", "--launcher", "threads")
    done = spindle_command(*options)
    assert (done.code, done.out) == (1, "")
    told = r"step 1 \(weights are as they were\): the loss of task 't' is (inf|nan|not finite)"  # as its rank knows it
    assert re.search(told, done.err)
    done = spindle_command(*options, "--not-finite", "ignore")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "warning" in line]
    assert re.match(r"spindle: warning: step 1: the loss of t is (inf|nan); lower the learning rate", line)


def test_train_as_text(folder: Path, spindle_command: Spindle) -> None:
    done = spindle_command("train", "model.py", "--steps", "2", "--launcher", "threads")
    assert done.code == 0
    steps, first, last = done.out.splitlines()
    assert steps.startswith("2 steps in ")
    assert first.startswith("first t ")
    assert last.startswith("last  t ")


def test_export_says_where_components_went(folder: Path, spindle_command: Spindle) -> None:
    """The same as text and as JSON; what it names exists."""
    assert spindle_command("export", "model.py", "-o", "out").out == f"{'net':20} out/net\n"
    found = one_object(spindle_command("export", "model.py", "-o", "out", "--json"))
    assert found == {"components": {"net": "out/net"}}
    assert list((folder / "out" / "net").iterdir())


def test_what_transformers_writes_is_told_once(folder: Path, spindle_command: Spindle) -> None:
    """Its own bars do not stand between our lines."""
    (folder / "words.py").write_text(
        "import spindle\nfrom transformers import BertConfig, BertModel\n"
        "sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)\n"
        "workload = spindle.Workload('words')\nworkload.component('text', BertModel(BertConfig(**sizes)))\n"
    )
    done = spindle_command("export", "words.py", "-o", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.split() == ["text", os.path.join("out", "text")]


def test_the_file_may_bring_its_optimizer(folder: Path, spindle_command: Spindle) -> None:
    """A function `optimizer` in the file is used in place of AdamW: here it leaves the weights alone."""
    (folder / "still.py").write_text(
        f"{MODEL}\n\ndef optimizer(parameters):\n    return torch.optim.SGD(parameters, lr=0.0)\n"
    )
    done = spindle_command("train", "still.py", "--steps", "3", "--launcher", "threads", "--json")
    assert len({step["t"] for step in one_object(done)["losses"]}) == 1
    done = spindle_command("train", "still.py", "--steps", "3", "--launcher", "threads", "--lr", "9")
    assert done.code == 2
    assert "--lr 9 is of AdamW, and still.py has an `optimizer`" in done.err


def test_a_bad_end_is_explained(folder: Path, spindle_command: Spindle) -> None:
    """The error says which command reads the record; that says who stopped first, and shows no control characters."""
    (folder / "breaking.py").write_text(
        f"{MODEL}\n\nclass Hot(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        raise ValueError('too \\x1b[31mhot')\n\n"
        "def optimizer(parameters):\n    return Hot(parameters, lr=0.1)\n"
    )
    run = ("train", "breaking.py", "--launcher", "threads", "--checkpoints", "runs/h", "--steps", "4")
    done = spindle_command(*run)
    assert done.code == 1
    hint = "`spindle flight runs/h` shows what each rank did last. Set SPINDLE_DEBUG=1 to see the traceback."
    assert done.err.splitlines()[-1] == hint
    done = spindle_command("flight", "runs/h", "--last", "3")
    assert (done.code, done.err) == (0, "")
    assert re.search(
        r"Rank \d \(.*\) stopped first: it failed: rank \d, STEP raised ValueError: too \\x1b\[31mhot\.", done.out
    )
    assert len(done.out.partition("seconds ")[2].splitlines()) == 4
    assert max(map(len, done.out.splitlines())) <= 100
    found = one_object(spindle_command("flight", "runs/h/flight/1", "--json", "--last", "2"))
    assert found["why"].startswith("it failed: rank")
    assert [len(found["events"]), len(found["ranks"])] == [2, 2]
    done = spindle_command("flight", "runs")
    assert (done.code, done.out) == (2, "")
    assert "runs: holds the records of 0 ranks" in done.err


@pytest.mark.filterwarnings("always::spindle.errors.SpindleWarning")
def test_checkpoints_are_listed_resumed_and_compared(folder: Path, spindle_command: Spindle) -> None:
    """A resumed run keeps the rate that it was begun with, unless another is given; what is damaged has exit code 1."""
    run = ("train", "model.py", "--launcher", "threads", "--checkpoints", "runs/a", "--every", "2", "--steps")
    assert spindle_command(*run, "4", "--lr", "0.5").code == 0
    done = spindle_command(*run, "6")
    assert (done.code, done.out) == (2, "")
    assert "holds checkpoints already (the newest after 4 steps)" in done.err
    done = spindle_command(*run, "6", "--resume")
    assert (done.code, "resumed after 4 steps" in done.out, "warning" in done.err) == (0, True, False)
    done = spindle_command(*run, "6", "--resume", "2", "--lr", "0.25")
    assert "lr of the optimizer was 0.5 when the checkpoint's run began and is 0.25" in done.said
    done = spindle_command("checkpoints", "runs/a", "--verify")
    assert (done.code, [line.split()[0] for line in done.out.splitlines()[1:4]]) == (
        0, ["step-00000002", "step-00000004", "step-00000006"]
    )  # fmt: skip
    two, four = "runs/a/step-00000002", "runs/a/step-00000004"
    assert spindle_command("checkpoints", two, two).out.startswith("equal: ")
    found = one_object(spindle_command("checkpoints", two, four, "--json"))
    assert found["equal"] is False
    assert {row["kind"] for row in found["differences"]} == {"differs"}
    (folder / four / "shard-00001.safetensors").write_bytes(b"")
    done = spindle_command("checkpoints", "runs/a")
    assert (done.code, "step-00000004            DAMAGED: runs/a/step-00000004/shard-00001" in done.out) == (1, True)
    assert spindle_command("checkpoints", two, four).code == 2
    assert "holds no checkpoints" in spindle_command("checkpoints", "runs").err
