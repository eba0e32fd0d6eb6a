"""``pcfast completion``: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash:  pcfast completion bash >> ~/.bashrc
    zsh:   pcfast completion zsh >> ~/.zshrc
    fish:  pcfast completion fish > ~/.config/fish/completions/pcfast.fish
    """
    program = context.find_root().command
    click.echo(get_completion_class(shell)(program, {}, "pcfast", "_PCFAST_COMPLETE").source())
