"""The commands' tree, and how each ends: with an exit code and, if it failed, one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from recsys import __version__
from recsys.cli.admin_commands import pause, rebuild, resume, rollback, verify
from recsys.cli.client_commands import feedback, recommend, versions
from recsys.cli.config_command import config
from recsys.cli.demo import demo
from recsys.cli.doctor import doctor
from recsys.cli.evaluate_command import evaluate
from recsys.cli.fit_command import fit
from recsys.cli.import_command import import_
from recsys.cli.quarantine_commands import quarantine
from recsys.cli.run_commands import compile_, serve, serve_shared, store, train, up
from recsys.cli.settings_flags import ConfigFile, takes_settings
from recsys.cli.status_command import status
from recsys.cli.user_commands import forget, why
from recsys.errors import RecsysError, SettingsError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"max_content_width": 120})


def _version(wanted: bool) -> None:
    if wanted:
        print(f"recsys {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def recsys(
    ctx: typer.Context,
    config: ConfigFile = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Recommend, and learn from feedback while doing so.

    Start with `recsys demo`, or `recsys up` and the examples of README.md.
    """
    ctx.obj = config
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


_PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Run": {
        "demo": takes_settings(demo),
        "up": takes_settings(up),
        "serve": takes_settings(serve),
        "train": takes_settings(train),
        "config": takes_settings(config),
        "compile": takes_settings(compile_),
    },
    "Ask and tell a server": {
        "recommend": recommend,
        "why": why,
        "feedback": feedback,
        "import": import_,
        "status": status,
        "rollback": rollback,
        "pause": pause,
        "resume": resume,
    },
    "Find out what is wrong": {"doctor": takes_settings(doctor)},
    "Look into the store": {"verify": takes_settings(verify), "rebuild": takes_settings(rebuild)},
    "Learn from a file": {"evaluate": takes_settings(evaluate), "fit": takes_settings(fit)},
}
for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(versions, name="versions", rich_help_panel="Ask and tell a server")
app.add_typer(forget, name="forget", rich_help_panel="Ask and tell a server")
app.add_typer(quarantine, name="quarantine", rich_help_panel="Look into the store")
app.command("store", hidden=True)(takes_settings(store))
app.command("serve-shared", hidden=True)(takes_settings(serve_shared))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: that of sys.argv) and return the exit code.

    0 done, 1 failed, 2 wrongly asked for (settings too), 130 interrupted.
    """
    try:
        code = app(arguments, standalone_mode=False, prog_name="recsys")
    except RecsysError as error:
        return _failed(str(error), 2 if isinstance(error, SettingsError) else 1)
    except typer.TyperException as error:
        return _failed(error.format_message(), error.exit_code)
    return code if isinstance(code, int) else 0


def _failed(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    return code
