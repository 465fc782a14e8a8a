"""`spindle submit`: a training run as a job of a Ray cluster."""

import functools
import importlib.util
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spindle.cli.group import JSON, cli, read_plan
from spindle.cli.terminal import json_text, say
from spindle.errors import ClusterError, FormatError, RunError

if TYPE_CHECKING:
    from spindle.runtime.launch.jobs import Jobs
    from spindle.runtime.launch.package import Package

LOCAL = "http://127.0.0.1:8265"
OUTPUTS = ("checkpoints", "metrics", "trace_file", "tensorboard")


@cli.command()
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- SOURCE ARGS OF train]")
@click.option("--address", "-a", metavar="URL", help=f"Ray's dashboard. Default: $RAY_API_SERVER_ADDRESS, or {LOCAL}.")
@click.option("--working-dir", metavar="DIR", help="Sent with the job, which runs in a copy. Default: this folder.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Files and folders of it that stay here.")
@click.option("--env", "env", multiple=True, metavar="KEY=VAL|FILE", help="Environment variables of the job.")
@click.option("--pip", "pip", multiple=True, metavar="PACKAGE|FILE", help="Packages that its nodes install first.")
@click.option("--job-id", metavar="ID", help="Default: spindle-DATE-TIME-XXXX.")
@click.option("--no-wait", is_flag=True, help="Do not follow the log.")
@click.option("--follow", metavar="ID", help="Follow the log of a job, from its start.")
@click.option("--stop", metavar="ID", help="Stop a job.")
@JSON
def submit(
    train_args: tuple[str, ...],
    address: str | None,
    working_dir: str | None,
    exclude: tuple[str, ...],
    env: tuple[str, ...],
    pip: tuple[str, ...],
    job_id: str | None,
    no_wait: bool,
    follow: str | None,
    stop: str | None,
    as_json: bool,
) -> None:
    """Train on a Ray cluster: send `spindle train ARGS` as a job, follow its log, stop it.

    Ctrl-C leaves the job running. Exit 1 when it failed or was stopped.

    \b
    spindle submit --address http://head:8265 -- model.py:workload --plan plan.json --steps 1000
    spindle submit --follow ID
    spindle submit --stop ID
    """
    if sum(map(bool, (train_args, follow, stop))) != 1:
        raise click.UsageError("Give either `-- SOURCE ARGS OF train`, or --follow ID, or --stop ID.")
    where = address or _address()
    if train_args:
        folder = Path(working_dir or ".")
        needed = _checked(train_args, folder)
        packages = _packages(pip)
        runtime_env: dict[str, Any] = {"env_vars": _variables(env)} | ({"pip": packages} if packages else {})
        follow = job_id or time.strftime(f"spindle-%Y%m%d-%H%M%S-{secrets.token_hex(2)}")
        with tempfile.TemporaryDirectory() as scratch:
            package = _packed(folder, Path(scratch), needed, exclude) if working_dir or needed else None
            jobs = _jobs(where)
            if package is not None:
                from spindle.words.harmless import harmless

                runtime_env["working_dir"] = str(package.path)
                say(harmless(f"sending {package.summary(folder)}"))
            jobs.submit(shlex.join(("python", "-m", "spindle", "train", *train_args)), runtime_env, follow)
        if no_wait:
            values = {"job_id": follow, "address": jobs.address, "status": "PENDING"}
            click.echo(json_text(values) if as_json else follow)
            return
        click.echo(f"job {follow} sent to {jobs.address}", err=as_json)
    elif stop:
        values = {"job_id": stop, "address": where, "status": _jobs(where).stop(stop)}
        click.echo(json_text(values) if as_json else f"job {stop}: {values['status']}")
        return
    else:
        jobs = _jobs(where)
    _follow(jobs, str(follow), as_json)


def _follow(jobs: "Jobs", job_id: str, as_json: bool) -> None:
    """The job's log on stdout, or on stderr beside JSON; RunError when it does not succeed."""
    tell = functools.partial(click.echo, err=True)
    try:
        ended = jobs.follow(job_id, functools.partial(click.echo, nl=False, err=as_json), tell)
    except KeyboardInterrupt:
        here = f"spindle submit --address {jobs.address}"
        tell(f"\njob {job_id} goes on\nfollow it:  {here} --follow {job_id}\nstop it:    {here} --stop {job_id}")
        click.get_current_context().exit(130)
    if as_json:
        values = {"job_id": job_id, "address": jobs.address, "status": ended.status, "message": ended.message}
        click.echo(json_text(values | {"last_lines": ended.last_lines[-10:]}))
    if not ended.ok:
        raise RunError("\n".join((f"job {job_id} {ended.status}: {ended.message}", *ended.last_lines[-2:])))
    if not as_json:
        tell(f"job {job_id} {ended.status}")


def _address() -> str:
    """As Ray's own tools find it; RAY_ADDRESS may also be the address of a cluster's inside, which is no use here."""
    inside = os.environ.get("RAY_ADDRESS", "")
    return os.environ.get("RAY_API_SERVER_ADDRESS") or (inside if inside.startswith("http") else LOCAL)


def _jobs(address: str) -> "Jobs":
    if importlib.util.find_spec("aiohttp") is None:
        raise ClusterError("Ray's job client is not installed; pip install 'ray[default]'")
    from spindle.runtime.launch.jobs import Jobs

    return Jobs(address)


def _checked(train_args: Sequence[str], folder: Path) -> list[str]:
    """Files of the working directory that these arguments of `train` name; none when the source has an absolute path.

    What would fail on the cluster fails here: options that train does not have, files that are not there or broken.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: cannot be sent (not a folder); give --working-dir")
    from spindle.verbs.source import check_syntax, python_file

    given = cli.commands["train"].make_context("spindle train", list(train_args)).params
    if given["launcher"] not in ("auto", "ray"):
        raise FormatError(f"launcher {given['launcher']!r} does not run in a Ray job; leave --launcher out")
    for name in OUTPUTS:
        if given[name] and not os.path.isabs(given[name]):
            raise FormatError(
                f"--{name.removesuffix('_file')} {given[name]} would lie in the job's copy of the working directory, "
                "which goes away; give an absolute path on storage that all nodes share"
            )
    source, plan = python_file(given["source"]), given["plan_file"]
    needed = [path for path in (source, plan) if path and not os.path.isabs(path)]
    for path in needed:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise FormatError(
                f"{path} lies outside the working directory {folder}; give --working-dir, a folder above it"
            )
    if not os.path.isabs(source):
        check_syntax(folder / source)
    if plan and not os.path.isabs(plan):
        read_plan(str(folder / plan))
    return needed


def _packed(folder: Path, scratch: Path, needed: Sequence[str], exclude: Sequence[str]) -> "Package":
    from spindle.runtime.launch.package import pack

    return pack(folder, scratch / "working_dir.zip", needed=needed, exclude=exclude)


def _variables(given: Sequence[str]) -> dict[str, str]:
    """KEY=VAL, or files of such lines."""
    found: dict[str, str] = {}
    for text in given:
        lines = [text] if "=" in text else _lines(text, "--env", "KEY=VAL")
        for line in lines:
            key, equals, value = line.removeprefix("export ").partition("=")
            if not equals or not key.strip().isidentifier():
                raise FormatError(f"--env {line!r} is not KEY=VAL; give a name and a value")
            found[key.strip()] = value.strip() if len(lines) > 1 else value
    return found


def _packages(given: Sequence[str]) -> list[str]:
    """Requirements, or files of them."""
    return [p for text in given for p in (_lines(text, "--pip", "") if text.endswith(".txt") else [text])]


def _lines(path: str, option: str, other: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise FormatError(
            f"{option} {path}: cannot be read ({reason}); give {other or 'packages'} or a file"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
