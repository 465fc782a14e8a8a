"""Completion: the lines that a shell needs, and words that bash splits made whole."""

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from spindle.cli.group import cli


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the lines that let SHELL complete commands, options, files, device types and methods.

    \b
    eval "$(spindle completion bash)"      # in ~/.bashrc; the same with zsh in ~/.zshrc
    spindle completion fish | source       # in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "spindle", "_SPINDLE_COMPLETE").source())


class _Bash(BashComplete):
    """Bash hands over `4x8:a100` in three words and wants only what follows the colon."""

    given = ""  # before and with the last colon

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in (*args, incomplete):
            if words and (word == ":" or words[-1].endswith(":")):
                words[-1] += word
            else:
                words.append(word)
        incomplete = words.pop()
        self.given = incomplete[: incomplete.rfind(":") + 1]
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value.removeprefix(self.given)}"


add_completion_class(_Bash, "bash")
