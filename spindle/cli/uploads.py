"""The option that keeps a copy of a run's checkpoints in object storage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spindle.cli.options import not_negative
from spindle.cli.terminal import warn


def with_upload(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that `uploads_of` reads."""
    for option in (
        click.option(
            "--upload-wait",
            type=float,
            default=600.0,
            show_default=True,
            metavar="SECONDS",
            callback=not_negative,
            help="Of --upload: how long the end of the run waits for what is not there yet.",
        ),
        click.option(
            "--upload",
            metavar="URL",
            help="Copy checkpoints to s3://BUCKET/FOLDER or the like, beside the steps; --resume fetches from there.",
        ),
    ):
        command = option(command)
    return command


def uploads_of(
    url: str | None, wait_s: float, checkpoints: str | None, *, resume: str | None, launcher: Any, in_stages: bool
) -> dict[str, Any]:
    """What `spindle.train` is asked so that checkpoints are uploaded. A run that resumes has the newest checkpoint of
    the URL in its folder when this returns, unless the folder has one of as many steps.
    """
    if url is None:
        return {}
    if not checkpoints:
        raise click.UsageError("--upload needs --checkpoints DIR, where the checkpoints of the run are written.")
    if in_stages:
        raise click.UsageError("--upload is of a run in one folder; leave it out, or train one stage at a time.")
    if resume == "newest":  # here already, since the rate that it was trained with is the default of --lr
        from spindle.runtime.controller import place_among_drivers
        from spindle.runtime.launch.fetching import fetch_newest

        fetch_newest(url, Path(checkpoints), warn, place=place_among_drivers(launcher))
    return {"upload": url, "upload_wait_s": wait_s}
