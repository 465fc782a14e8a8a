"""Files: JSON text in, checked values out, and back. With `clusterfile`, the only door for bytes from outside.

Every format carries its name and version; unknown formats, versions and fields are refused by name. Files are data:
nothing is ever unpickled.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Tag, ValidationError

from spindle.errors import FormatError, InputError
from spindle.files.filemodels import CalibrationModel, MetaGraphModel, PlanModel, ProfileModel, TraceModel
from spindle.files.filetypes import MOST_FILE_BYTES
from spindle.values.calibration import Calibration
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from spindle.values.profile import Profile
from spindle.values.trace import Trace
from spindle.words.nearest import did_you_mean

Value = MetaGraph | Plan | Profile | Trace | Calibration
ValueT = TypeVar("ValueT", MetaGraph, Plan, Profile, Trace, Calibration)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects with one key twice would lose a value silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FormatError(f"key {key!r} stands twice in one object; keep one")
        found[key] = value
    return found


_Models = type[MetaGraphModel] | type[PlanModel] | type[ProfileModel] | type[TraceModel] | type[CalibrationModel]
_MODEL_BY_TYPE: Mapping[type, _Models] = {
    MetaGraph: MetaGraphModel,
    Plan: PlanModel,
    Profile: ProfileModel,
    Trace: TraceModel,
    Calibration: CalibrationModel,
}
_MODEL_BY_FORMAT: Mapping[str, _Models] = {
    str(model.model_fields["format"].default): model for model in _MODEL_BY_TYPE.values()
}


def to_dict(value: Value) -> dict[str, Any]:
    """The JSON object of a value. Raises FormatError for one that no file may hold."""
    try:
        return _MODEL_BY_TYPE[type(value)].of(value).model_dump(mode="json")  # type: ignore[arg-type]
    except ValidationError as error:
        found = explain_validation(error, _MODEL_BY_TYPE[type(value)])
        raise FormatError(f"this {type(value).__name__} cannot be written: {found}") from None


def dumps(value: Value) -> str:
    """The JSON text of a value; `loads` gives an equal value back."""
    return json.dumps(to_dict(value), indent=1)


def loads(text: str, expect: type[ValueT], *, source: str = "text") -> ValueT:
    """Read a value of type `expect` from JSON text; `source` names the text in errors.

    Raises FormatError unless the text is well formed, of that format and of a known version.
    """
    data = parse_json(text, source=source)
    value = _checked(data, source)
    if not isinstance(value, expect):
        raise FormatError(f"{source}: is a {data['format']} file; here a {expect.__name__} is needed")
    return value


def parse_json(text: str, *, source: str = "text") -> Any:
    """What a JSON text holds; raises FormatError when it is no JSON or gives one key twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets too
        raise FormatError(f"{source}: not JSON ({error}); the file may be cut off, write it again") from None


def _checked(data: Any, source: str) -> Value:
    name = data.get("format") if isinstance(data, dict) else None
    model = _MODEL_BY_FORMAT.get(name) if isinstance(name, str) else None
    if model is None:
        raise FormatError(f"{source}: format is {name!r}; this Spindle reads {', '.join(_MODEL_BY_FORMAT)}")
    if data.get("version") != 1 or type(data["version"]) is not int:  # True == 1.0 == 1
        raise FormatError(
            f"{source}: {name} version {data.get('version')!r}; this Spindle reads version 1, write the file again"
        )
    try:
        return model.model_validate_json(json.dumps(data)).value()
    except ValidationError as error:
        raise FormatError(f"{source}: {explain_validation(error, model)}") from None
    except InputError as error:
        raise type(error)(f"{source}: {error}") from None


def explain_validation(error: ValidationError, model: type[BaseModel], limit: int = 2) -> str:
    """Pydantic's findings about a `model` in one line: where, what was found, and the rule."""
    found = []
    items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")  # a slip of the pen comes first
    for item in items[:limit]:
        parts, known = _place(model, item["loc"])
        where = ".".join(parts) or "the file"
        if item["type"] == "extra_forbidden":
            found.append(f"{where} is not a known field{did_you_mean(parts[-1], known) or '; remove it'}")
        elif item["type"] == "missing":
            found.append(f"{where} is missing; add it")
        elif item["type"] == "string_pattern_mismatch" and isinstance(item["input"], str):
            found.append(f"{where} is {item['input'][:60]!r}: it holds a control character; remove it")
        else:
            found.append(f"{where} is {str(item['input'])[:60]!r}: {item['msg'].lower()}")
    more = error.error_count() - limit
    return "; ".join(found) + (f"; and {more} more" if more > 0 else "")


def _place(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], set[str]]:
    """The keys that lead to a finding, as the file has them, and the fields that are known in its last mapping."""
    models: dict[str, type[BaseModel]] = {"": model}
    keys = []
    for index, part in enumerate(map(str, loc)):
        if part in models or part.startswith("("):  # the tag of one of several kinds of value
            models = {"": models[part]} if part in models else models
            continue
        keys.append(part)
        fields = [each.model_fields[part] for each in models.values() if part in each.model_fields]
        inside = {tag: each for field in fields for tag, each in _models(field.annotation)}
        models = inside if inside and index < len(loc) - 1 else models
    return keys, {name for each in models.values() for name in each.model_fields}


def _models(kind: object, tag: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(tag, model) of each file model in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield tag or kind.__name__, kind
    for part in get_args(kind):
        tags = [each.tag for each in get_args(kind) if isinstance(each, Tag)]
        yield from _models(part, tags[0] if tags else tag)


def read(path: str | Path, expect: type[ValueT]) -> ValueT:
    """Read a value from a JSON file; errors as `loads`, and FormatError when the file cannot be read."""
    return loads(read_text(path), expect, source=str(path))


def read_text(path: str | Path, most_bytes: int = MOST_FILE_BYTES) -> str:
    """Text of a file, without the mark that some editors and spreadsheets put first (BOM).

    Raises FormatError naming the path when it is missing, a folder, not text, or longer than `most_bytes`.
    """
    try:
        endless = stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith(("/dev/", "/proc/"))
        with open(os.devnull if endless else path, "rb") as file:
            data = file.read(most_bytes + 1)
        text = data[:most_bytes].decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:  # not text; a path with a zero in it
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise FormatError(f"{path}: cannot be read ({reason}); check the path") from None
    if endless:
        raise FormatError(f"{path}: is a pipe, which may never end; give a file, or /dev/stdin")
    if len(data) > most_bytes:
        raise FormatError(
            f"{path}: has more than {most_bytes // 2**20} MiB, which no file of this kind has; check the path"
        )
    return text


def write(value: Value, path: str | Path) -> None:
    """Write a value as JSON; the file appears whole or not at all."""
    write_text(dumps(value) + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a text file; it appears whole or not at all. Raises FormatError when the path cannot be written."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: str | Path) -> None:
    """The same of bytes."""
    target = Path(path)
    try:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:  # who may read it is for the umask to say
                file.write(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror}); check the folder") from None
