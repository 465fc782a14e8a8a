"""Layout: what docs/decisions/0001-links.md promises, what may be imported under which name, and how light it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import spindle

ROOT = Path(__file__).parents[2]


def python(code: str, *, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("room", ["planner", "runtime"])
def test_links_are_links(room: str) -> None:
    """`spindle/planner` and `spindle/runtime` lead to the real folders at the top, by a relative path."""
    link = ROOT / "spindle" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert (ROOT / room / "__init__.py").is_file()
    assert not (ROOT / room).is_symlink()


@pytest.mark.parametrize("room", ["planner", "runtime"])
def test_rooms_have_one_name(room: str) -> None:
    """`import planner` is refused, and says what to write instead."""
    done = python(f"import {room}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: this package is named spindle.{room}, not '{room}'")
    assert f"write `import spindle.{room}`" in last


def test_importing_spindle_is_light() -> None:
    """No library that takes time or a device comes with `import spindle`."""
    done = python("import json, sys, spindle; print(json.dumps(sorted(sys.modules)))")
    modules = set(json.loads(done.stdout))
    assert modules.isdisjoint(("torch", "ray", "pulp", "highspy", "networkx", "numpy", "pydantic", "yaml", "click"))
    assert {name for name in modules if name.startswith("spindle")} == {"spindle"}


def test_public_names() -> None:
    """The public face, in full: a new name here is a promise to users."""
    assert spindle.__all__ == [
        "EMA",
        "Calibration",
        "EarlyStop",
        "Evaluation",
        "Failures",
        "Plan",
        "Profile",
        "RayNodes",
        "SpindleError",
        "Stage",
        "TrainResult",
        "Weights",
        "Workload",
        "__version__",
        "evaluate",
        "export",
        "load_checkpoint",
        "make_calibration",
        "make_metagraph",
        "make_plan",
        "make_profile",
        "per_sample",
        "train",
        "train_stages",
        "verify",
    ]
    assert dir(spindle) == sorted(spindle.__all__)


@pytest.mark.parametrize("name", spindle.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """And none of them bears a module's name, which an import of that module would overwrite."""
    value = getattr(spindle, name)
    assert value is not None
    modules = {path.stem for path in (ROOT / "spindle").iterdir() if not path.name.startswith("__")}
    assert name not in modules
    assert name == "__version__" or value.__doc__


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'spindle' has no attribute 'plot'; it has Calibration, EMA, EarlyStop, "
    ):
        spindle.plot  # noqa: B018


@pytest.mark.parametrize("room", ["planner", "runtime"])
def test_rooms_never_import_each_other(room: str) -> None:
    """The planner decides without torch, the runtime acts without a solver; only a Plan passes between them."""
    barred = {"planner": ["torch", "ray", "spindle.runtime"], "runtime": ["pulp", "highspy", "spindle.planner"]}[room]
    files = [path for path in (ROOT / room).rglob("*.py") if path.stem not in ("__init__", "ray_workers")]
    modules = [".".join(("spindle", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    code = f"import importlib, json, sys\n[importlib.import_module(m) for m in {sorted(modules)!r}]\n"
    done = python(f"{code}print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)).isdisjoint(barred)


def test_links_that_came_as_text_are_named(tmp_path: Path) -> None:
    """As git checks them out with core.symlinks=false."""
    (tmp_path / "spindle").mkdir()
    (tmp_path / "spindle" / "__init__.py").write_bytes((ROOT / "spindle" / "__init__.py").read_bytes())
    (tmp_path / "spindle" / "planner").write_text("../planner")
    last = python("import sys; sys.path.insert(0, '.'); import spindle", cwd=tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ImportError: spindle/planner of this checkout is a text file where git has a link: run")
