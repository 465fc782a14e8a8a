"""Audit: the pinned packages (constraints.txt) against what is known about them. Run by `make audit`; exit code 1 when
something is found.

- Each installed package is pinned, at the installed version, and the packages agree with each other (pip check).
- pip's reports of what was installed: no release that its authors took back (yanked), each with a checksum.
- Advisories, by pip-audit, which asks PyPI. Where no answer is to be had it says so; --require-advisories makes that a
  finding too. Exceptions stand in .ci/audit_exceptions.txt: an advisory, a space, the reason.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / ".venv" / "reports"
EXCEPTIONS = ROOT / ".ci" / "audit_exceptions.txt"
NOT_PINNED = {"setuptools", "spindle", "wheel"}  # of the environment itself, and ours


def main() -> int:
    """Print what is found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require-advisories", action="store_true")
    required = parser.parse_args().require_advisories
    pins = pins_in((ROOT / "constraints.txt").read_text())
    reported = [p for file in sorted(REPORTS.glob("*.json")) for p in json.loads(file.read_text())["install"]]
    found = unpinned({each.name: each.version for each in distributions()}, pins) + disagreements()
    found += taken_back(reported)
    known, unanswered = advisories(pip_audit(pins), exceptions_in(EXCEPTIONS.read_text()))
    found += known
    silent = len(pins) - sum("is_yanked" in package for package in reported)
    if silent > 0:
        print(f"NOT CHECKED whether {silent} pinned packages were taken back: pip has not reported their installation")
    if unanswered:
        told = f"NOT CHECKED for advisories: {len(unanswered)} of {len(pins)} pinned packages; PyPI gave no answer"
        print(told)
        found += [told] * required
    for line in found:
        print(f"FOUND {line}")
    print(f"audit: {len(pins)} pinned packages, {len(found)} findings")
    return bool(found)


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_in(text: str) -> dict[str, str]:
    """Versions by name, in a file of constraints."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def exceptions_in(text: str) -> dict[str, str]:
    """Reasons by advisory; raises ValueError for an advisory without a reason."""
    found = {}
    for line in text.splitlines():
        name, _, reason = line.partition("#")[0].strip().partition(" ")
        if name and not reason.strip():
            raise ValueError(f"the exception {name} has no reason; write one behind it")
        found[name] = reason.strip()
    return found


def unpinned(installed: Mapping[str, str], pins: Mapping[str, str]) -> list[str]:
    """Installed packages that are not pinned, or have another version."""
    public = {normal(name): version.partition("+")[0] for name, version in installed.items()}
    return [
        f"{name} {version} is installed and {pins.get(name, 'nothing')} is pinned; pin it in constraints.txt"
        for name, version in sorted(public.items())
        if name not in NOT_PINNED and pins.get(name, "").partition("+")[0] != version
    ]


def disagreements() -> list[str]:
    """What `pip check` finds."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode else []


def taken_back(reported: Iterable[Mapping[str, Any]]) -> list[str]:
    """Yanked releases, and releases without a checksum, among packages in pip's reports of an installation."""
    found = []
    for package in reported:
        name = f"{package['metadata']['name']} {package['metadata']['version']}"
        if package.get("is_yanked"):
            found.append(f"{name} was taken back by its authors (yanked); pin another release")
        archive = package["download_info"].get("archive_info")
        if archive is not None and not archive.get("hashes"):
            found.append(f"{name} came without a checksum; install it from an index that gives one")
    return found


def pip_audit(pins: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """What pip-audit says of each pinned package; of none where it fails as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "pins.txt"
        wanted.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in pins.items()))
        command = (sys.executable, "-m", "pip_audit", "-r", str(wanted), "--no-deps", "--disable-pip")
        options = ("--format", "json", "--progress-spinner", "off", "--vulnerability-service", "pypi")
        done = subprocess.run((*command, *options), capture_output=True, text=True, timeout=300, check=False)
    try:
        found: list[Mapping[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit: {(done.stderr.strip().splitlines() or ['said nothing'])[-1][:300]}")
        return [{"name": name, "skip_reason": "pip-audit failed"} for name in pins]
    return found


def advisories(audited: Iterable[Mapping[str, Any]], exceptions: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Advisories that are no exceptions; and the packages of which nothing could be learned."""
    found, unanswered = [], []
    for package in audited:
        if "skip_reason" in package:
            unanswered.append(str(package["name"]))
            continue
        for known in package["vulns"]:
            if not {known["id"], *known.get("aliases", ())} & exceptions.keys():
                remedy = f"take {', '.join(known['fix_versions'])}" if known["fix_versions"] else "no release mends it"
                found.append(f"{package['name']} {package['version']} has {known['id']}; {remedy}")
    return found, unanswered


if __name__ == "__main__":
    sys.exit(main())
