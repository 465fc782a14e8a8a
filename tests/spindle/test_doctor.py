"""Doctor: each look at a machine in order, one that works less well, and one that will not run; the remedy is named."""

import json
from importlib import metadata

import pytest
from click.testing import CliRunner

from spindle.cli import cli
from spindle.verbs import doctor
from spindle.verbs.doctor import Finding

REQUIRED = ["torch>=2.11", "click>=8.1", 'transformers>=5.0; extra == "hf"', 'ruff>=0.11; extra == "dev"']


def versions(**known: str) -> dict[str, tuple[str, str]]:
    def installed(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    return {f.name: (f.status, f.remedy) for f in doctor.packages(REQUIRED, installed)}


def test_versions_in_range() -> None:
    """Builds of torch have a local part; extras for development are not asked for."""
    found = versions(torch="2.11.0+cu130", click="8.5.1", transformers="5.23.0")
    assert found == {"torch": ("ok", ""), "click": ("ok", ""), "transformers": ("ok", "")}


def test_versions_out_of_range() -> None:
    """Too old or missing is a failure for what a run needs, a warning for what brings models."""
    assert versions(torch="2.9.1") == {
        "torch": ("fail", "pip install --upgrade 'torch>=2.11'"),
        "click": ("fail", "pip install 'click>=8.1'"),
        "transformers": ("warn", "pip install 'spindle[hf]' for models of the Hugging Face hub"),
    }


@pytest.mark.parametrize(
    ("finding", "status", "words"),
    [
        (doctor.python_version((3, 11, 7)), "ok", "3.11.7"),
        (doctor.python_version((3, 10, 1)), "fail", "use Python 3.11"),
        (doctor.gpus(8, "13.0", True), "ok", "8, CUDA 13.0"),
        (doctor.gpus(0, None, False), "ok", "none; runs use"),
        (doctor.gpus(0, None, True), "warn", "install the CUDA build"),
        (doctor.gpus(0, "13.0", True), "warn", "CUDA_VISIBLE_DEVICES"),
        (doctor.memory("MemTotal: 9 kB\nMemAvailable:   8388608 kB\n"), "ok", "8.0 GiB free"),
        (doctor.memory("MemAvailable:   524288 kB\n"), "warn", "0.5 GiB free"),
        (doctor.memory(""), "ok", "unknown"),
        (doctor.shared_memory(2.0 * doctor.GIB), "ok", "2.00 GiB free"),
        (doctor.shared_memory(64.0 * 2**20), "warn", "--shm-size"),
        (doctor.shared_memory(None), "ok", "no /dev/shm"),
        (doctor.open_files(65536), "ok", "65536"),
        (doctor.open_files(1024), "warn", "ulimit -n"),
        (doctor.open_files(-1), "ok", "no limit"),
        (doctor.interface("eth1", None, ["lo", "eth1"]), "ok", "eth1, by GLOO"),
        (doctor.interface("eth9", None, ["lo", "eth1"]), "fail", "choose of eth1, lo"),
        (doctor.interface(None, "eth1", ["lo", "eth1"]), "ok", "eth1 leads to other machines"),
        (doctor.interface(None, None, ["lo"]), "warn", "set GLOO_SOCKET_IFNAME"),
    ],
)
def test_looks(finding: Finding, status: str, words: str) -> None:
    assert finding.status == status
    assert words in f"{finding.found} {finding.remedy}"
    assert bool(finding.remedy) == (status != "ok")


def test_a_temporary_directory_that_is_not_there() -> None:
    """The remedy names the variable."""
    finding = doctor.temporary("no/such/directory")
    assert (finding.status, finding.found) == (
        "fail",
        "no/such/directory cannot be written (No such file or directory)",
    )
    assert "TMPDIR" in finding.remedy


def test_two_ranks_add_over_gloo() -> None:
    """The trial is real; loopback answers wherever tests run."""
    assert doctor.gloo_trial().status == "ok"
    assert doctor.loopback().status == "ok"


def test_a_trial_that_finds_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface that is none is a failure with a remedy, not a stack of calls."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    finding = doctor.gloo_trial(2.0)
    assert finding.status == "fail"
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


def test_a_look_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on, and the command ends with 1."""

    def broken() -> list[Finding]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "LOOKS", (("odd", broken), ("loopback", lambda: [doctor.loopback()])))
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert "fail  odd              RuntimeError: no such thing\n" in done.output
    assert done.output.endswith("ok    loopback         127.0.0.1 answers\n")


def test_json_of_a_sound_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object and nothing else; warnings do not fail."""
    looks = (("open files", lambda: [doctor.open_files(1024)]),)
    monkeypatch.setattr(doctor, "LOOKS", looks)
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (0, True)
    assert told["findings"][-1]["status"] == "warn"
    assert {"python", "torch", "ray"} <= {finding["name"] for finding in told["findings"]}
