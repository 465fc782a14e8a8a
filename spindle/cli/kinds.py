"""Kinds of words on the command line: each says what a shell offers while one is typed."""

import os

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType


class File(StringParamType):
    """The name of a file; offered are files that end so, and folders on the way; all files when no suffix is given."""

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files that fit; where there is none the shell's own folders, through which it walks better."""
        if not self.suffixes:
            return [CompletionItem(incomplete, type="file")]
        folder, start = os.path.split(incomplete)
        try:
            entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
        except OSError:
            return []
        entries = [e for e in entries if e.name.startswith(start) and (start or not e.name.startswith("."))]
        fit = [e.name for e in entries if e.name.endswith(self.suffixes) and e.is_file()]
        if not fit:
            return [CompletionItem(incomplete, type="dir")]
        folders = [f"{e.name}/" for e in entries if e.is_dir()]
        return [CompletionItem(os.path.join(folder, name)) for name in (*fit, *folders)]


class SourceFile(File):
    """A spec, a MetaGraph, or file.py:name; names are read off the text of the file, which is not run."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files, and what file.py assigns and defines behind its colon."""
        path, colon, start = incomplete.partition(".py:")
        if not colon:
            return super().shell_complete(ctx, param, incomplete)
        import ast

        try:
            with open(os.path.expanduser(f"{path}.py"), encoding="utf-8") as file:
                body = ast.parse(file.read()).body
        except (OSError, ValueError, SyntaxError):
            return []
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        names += [node.name for node in body if isinstance(node, ast.FunctionDef)]
        fit = [name for name in dict.fromkeys(names) if name.startswith(start) and not name.startswith("_")]
        return [CompletionItem(f"{path}.py:{name}") for name in fit]


class Folder(StringParamType):
    """The name of a folder."""

    name = "dir"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell's own folders."""
        return [CompletionItem(incomplete, type="dir")]


class ClusterText(StringParamType):
    """4x8, 4x8:a100-80g, or a YAML file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The built-in device types behind `4x8:`, or YAML files."""
        from spindle.files.clusterfile import device_types

        shape = incomplete.partition(":")[0] or "1x8"
        if not all(part.isdecimal() for part in shape.split("x")):
            return SPEC_FILE.shell_complete(ctx, param, incomplete)
        found = [f"{shape}:{name}" for name in device_types()]
        return [CompletionItem(text) for text in found if text.startswith(incomplete)]


class Method(StringParamType):
    """A planning method; the command checks it, since to know them takes the planner."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """All methods that begin so."""
        from spindle.planner.solve import METHODS

        return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


SOURCE_FILE = SourceFile(".py", ".yaml", ".yml", ".json")
SPEC_FILE = File(".yaml", ".yml")
JSON_FILE = File(".json")
CSV_FILE = File(".csv")
FILE, FOLDER, CLUSTER_TEXT, METHOD = File(), Folder(), ClusterText(), Method()
