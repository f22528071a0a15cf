"""The command line: ``cenote VERB``. One file a verb, imported when that verb runs, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# verb: (module:attribute, line in the overview). The attribute is the command's function, or a Typer with subcommands.
VERBS = {
    "probe": ("cenote.cli.probe:command", "Compare every readout on a frozen backbone and keep the best."),
    "predict": ("cenote.cli.predict:command", "Apply the readout that a probe kept to new inputs."),
    "cache": ("cenote.cli.cache:app", "List and clear the stored features."),
    "compress": ("cenote.cli.compress:command", "Compare methods that make a language model do less."),
    "reproduce": ("cenote.cli.reproduce:command", "Run a paper's central claim and give a verdict."),
    "list": ("cenote.cli.catalog:list_command", "List the systems: what there is, for what, from which paper."),
    "show": ("cenote.cli.catalog:show_command", "Show one system: paper, purpose, hosts, entry point."),
}

BAD_INPUT = (ValueError, TypeError, OSError, ImportError)  # FileNotFoundError and a full disk are OSErrors


def load_verb(name: str) -> typer.Typer:
    """Import a verb: its file offers a function, or a Typer with subcommands."""
    module, _, attribute = VERBS[name][0].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return target
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name)(target)
    return alone


class LazyVerb(TyperCommand):
    """Stands in the overview for a verb and turns into the real command when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        real = typer.main.get_command(load_verb(str(self.name)))
        return real.make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """Knows its verbs by name only."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> LazyVerb | None:
        if cmd_name not in VERBS:
            return None
        return LazyVerb(name=cmd_name, help=VERBS[cmd_name][1], rich_markup_mode="rich")


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode="rich")


def _version(wanted: bool) -> bool:
    if wanted:
        from cenote import __version__

        typer.echo(f"cenote {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also CENOTE_DEBUG=1).")
    ] = False,
) -> None:
    """From a pretrained network's tokens to the answer you need.

    Start with [bold]cenote probe[/bold]: no arguments, no network, two minutes. Each verb explains itself with --help.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status.

    0: done. 1: something unforeseen. 2: bad input, told in one line on standard error. 130: interrupted.
    ``--debug`` anywhere on the line, or ``CENOTE_DEBUG=1``, shows the traceback beside that line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("CENOTE_DEBUG", "0") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"] or ["--help"]
    try:
        with typer.main.get_command(app).make_context("cenote", args) as ctx:
            ctx.command.invoke(ctx)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130, debug)
    except BrokenPipeError:  # the reader of our output went away, as in `cenote list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BAD_INPUT as error:
        return _complain(str(error) or type(error).__name__, 2, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line parser
            return _complain(_usage(error), 2, debug)
        return _complain(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _complain(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"cenote: {' '.join(message.split())}", file=sys.stderr)
    return status


def _usage(error: Any) -> str:
    message = error.format_message().rstrip(".")
    path = error.ctx.command_path if getattr(error, "ctx", None) else "cenote"
    return f"{message}; `{path} --help` explains"
