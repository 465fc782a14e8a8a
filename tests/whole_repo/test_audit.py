"""The audit finds what it is for; no secret stands in the repository."""

import re
from typing import Any

import pytest

from tests.whole_repo.audit import advisories, exceptions_in, pins_in, taken_back, unpinned
from tests.whole_repo.test_files import ROOT, lines_with

AUDITED: list[dict[str, Any]] = [
    {"name": "good", "version": "1.0", "vulns": []},
    {"name": "bad", "version": "1.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}]},
    {"name": "unknown", "skip_reason": "not found"},
]
SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[0-9A-Za-z]{36}|\bgithub_pat_[0-9A-Za-z_]{40}",
    "a token of GitLab": r"\bglpat-[0-9A-Za-z_-]{20}",
    "a token of Hugging Face": r"\bhf_[0-9A-Za-z]{30}",
    "a token of PyPI": r"\bpypi-[0-9A-Za-z_-]{50}",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "a token of Slack": r"\bxox[abprs]-[0-9A-Za-z-]{10}",
    "a key of a model's provider": r"\bsk-[0-9A-Za-z_-]{32}",
    "a web token": r"\beyJ[0-9A-Za-z_-]{16,}\.eyJ[0-9A-Za-z_-]{16,}\.",
    "a password in an address": r"\b[a-z][a-z0-9+]{1,9}://[^\s/:@'\"{}<>$]+:[^\s/:@'\"{}<>$]+@\w",
    "a value for a secret": r"(?i)(?:passw(?:or)?d|secret|api_?key|auth_?token)\w*['\"]?\s*[:=]\s*"
    r"['\"][^'\"\s{}$]{12,}['\"]",
}
"""What secrets look like, by kind."""


def test_advisories_and_exceptions() -> None:
    """An advisory is found unless it, or another name of it, is an exception; what nothing is known of is told."""
    found = ["bad 1.0 has PYSEC-1; take 1.1"]
    assert advisories(AUDITED, {}) == (found, ["unknown"])
    assert advisories(AUDITED, exceptions_in("# none\n\nCVE-2  not used\n")) == (found, ["unknown"])
    assert advisories(AUDITED, exceptions_in("CVE-1 only reached by servers, which we start none of\n"))[0] == []
    with pytest.raises(ValueError, match="CVE-1 has no reason"):
        exceptions_in("CVE-1 # \n")


def test_pins() -> None:
    pins = pins_in("# all\nPy_YAML==6.0\ntorch==2.1  # CPU\n")
    assert pins == {"py-yaml": "6.0", "torch": "2.1"}
    assert unpinned({"py.yaml": "6.0", "torch": "2.1+cpu", "setuptools": "1"}, pins) == []
    assert unpinned({"torch": "2.2"}, pins) == ["torch 2.2 is installed and 2.1 is pinned; pin it in constraints.txt"]
    assert unpinned({"new": "1"}, pins) == ["new 1 is installed and nothing is pinned; pin it in constraints.txt"]


def test_releases_that_were_taken_back() -> None:
    about: dict[str, Any] = {"metadata": {"name": "a", "version": "1"}}
    fine = about | {"is_yanked": False, "download_info": {"archive_info": {"hashes": {"sha256": "0"}}}}
    ours = about | {"download_info": {"dir_info": {"editable": True}}}
    assert taken_back([fine, ours]) == []
    assert "yanked" in taken_back([fine | {"is_yanked": True}])[0]
    assert "without a checksum" in taken_back([fine | {"download_info": {"archive_info": {}}}])[0]


def test_the_constraints_are_pins() -> None:
    """Each line is one version of one package, and each exception has a reason."""
    pins = pins_in((ROOT / "constraints.txt").read_text())
    assert all(re.fullmatch(r"[\w.!+-]+", version) for version in pins.values())
    exceptions_in((ROOT / ".ci/audit_exceptions.txt").read_text())


@pytest.mark.parametrize("kind", SECRETS)
def test_no_secret(kind: str) -> None:
    """In no file that git keeps."""
    assert lines_with(SECRETS[kind]) == []


def test_secrets_would_be_found() -> None:
    """Negative control: one of each kind, put together here so that this file holds none."""
    made = {
        "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
        "a key of AWS": "AKIA" + "A" * 16,
        "a token of GitHub": "ghp_" + "a" * 36,
        "a token of GitLab": "glpat-" + "a" * 20,
        "a token of Hugging Face": "hf_" + "a" * 34,
        "a token of PyPI": "pypi-" + "a" * 60,
        "a key of Google": "AIza" + "a" * 35,
        "a token of Slack": "xoxb-" + "1" * 12,
        "a key of a model's provider": "sk-" + "a" * 40,
        "a web token": "eyJ" + "a" * 20 + ".eyJ" + "a" * 20 + ".a",
        "a password in an address": "https://me:" + "open@host",
        "a value for a secret": "DB_PASS" + "WORD = 'correct-horse-battery'",
    }
    assert {kind for kind, text in made.items() if re.search(SECRETS[kind], text)} == set(SECRETS)
