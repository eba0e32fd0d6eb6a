"""The options in docs/commands/*.md, written from the command line itself.

    .venv/bin/python docs/commands.py      # after a change of an option

Each page holds text of its own and, between two markers, what this writes; a test compares.
"""

from __future__ import annotations

from pathlib import Path

import click

from pcfast.cli import pcfast

PAGES = Path(__file__).resolve().parent / "commands"
BEGIN, END = "<!-- docs/commands.py: begin -->", "<!-- docs/commands.py: end -->"


def reference(command: click.Command) -> str:
    """Markdown: usage, and a table of arguments and options."""
    context = click.Context(command, info_name=f"pcfast {command.name}")
    lines = ["```", " ".join(command.get_usage(context).removeprefix("Usage:").split()), "```", ""]
    lines += ["| option | values | default | |", "|---|---|---|---|"]
    for parameter in command.params:
        row = _row(parameter, context)
        if row is not None:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def _row(parameter: click.Parameter, context: click.Context) -> tuple[str, str, str, str] | None:
    values = _values(parameter, context)
    if isinstance(parameter, click.Argument):
        return f"`{parameter.make_metavar(context)}`", values, "", ""
    text, _, default = (parameter.help or "").partition("  [default: ")
    default = default.removesuffix("]")
    if parameter.show_default:
        shown = parameter.default if isinstance(parameter.default, list | tuple) else [parameter.default]
        default = ", ".join(map(str, shown))
    return f"`{parameter.opts[0]}`", values, default, text


def _values(parameter: click.Parameter, context: click.Context) -> str:
    """What may be given: the choices, else the kind of value; "" for a flag."""
    if getattr(parameter, "is_flag", False):
        return ""
    if isinstance(parameter.type, click.Choice):
        values = ", ".join(map(str, parameter.type.choices))
    else:
        values = parameter.make_metavar(context).lower().strip("<>")
    return values + (", may be repeated" if getattr(parameter, "multiple", False) else "")


def with_reference(page: str, command: click.Command) -> str:
    """``page`` with the text between the markers replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{reference(command)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    for name, command in pcfast.commands.items():
        path = PAGES / f"{name}.md"
        path.write_text(with_reference(path.read_text(), command))


if __name__ == "__main__":
    main()
