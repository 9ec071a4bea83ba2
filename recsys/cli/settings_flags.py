"""Settings as flags: one for every setting, made from the model, so that none can be forgotten or named otherwise."""

from __future__ import annotations

import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from recsys.settings import CLASS_PRESETS, ENVIRONMENT_PREFIX, FeedbackClass, Settings, load
from recsys.store.running import running_url

# What says which store, and how it is reached.
SECURED = ("redis_password_file", "redis_tls_ca", "redis_tls_certificate", "redis_tls_key")
STORE = {"redis_url", *SECURED}
PANEL = f"Settings: flag, {ENVIRONMENT_PREFIX}NAME in the environment, or name in the TOML file"

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", envvar=f"{ENVIRONMENT_PREFIX}CONFIG", help="TOML file of settings"),
]

# Not from the environment: that must not go before a file given ahead of the command.
OwnConfigFile = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file of settings")]


@dataclass(frozen=True, slots=True)
class Given:
    """Hold the settings in force and where those come from that are not defaults.

    Flag, environment or file; or the running store, which tells its own address.
    """

    settings: Settings
    origin: Mapping[str, str]

    def otherwise(self, **defaults: Any) -> Settings:
        """Return the settings with these valid values for what was not given."""
        return self.settings.model_copy(update={n: v for n, v in defaults.items() if n not in self.origin})


def takes_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a flag for each setting, and --config; it is called with `given` in their place."""
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
    flags = {name: _annotation(name) for name in Settings.model_fields}

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        ctx: typer.Context = values.pop("ctx")
        file = values.pop("config") or ctx.obj
        texts = {name: values.pop(name) for name in flags}
        return command(given=_effective(ctx, texts, file), **values)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *(p.replace(kind=kind) for p in own if p.name != "given"),
        inspect.Parameter("ctx", kind, annotation=typer.Context),
        inspect.Parameter("config", kind, annotation=OwnConfigFile, default=None),
        *(inspect.Parameter(name, kind, annotation=hint, default=None) for name, hint in flags.items()),
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # how functions tell theirs
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _effective(ctx: typer.Context, texts: Mapping[str, Any], file: Path | None) -> Given:
    sources = {name: getattr(ctx.get_parameter_source(name), "name", "DEFAULT") for name in texts}
    flags = {name: text for name, text in texts.items() if sources[name] == "COMMANDLINE"}
    settings = load(flags, file=file)
    in_file = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    origin = dict.fromkeys(in_file, "file")
    origin |= {name: "environment" for name, source in sources.items() if source == "ENVIRONMENT"}
    origin |= dict.fromkeys(flags, "flag")
    # `up` has a store of its own there: whoever says nothing of another means that one.
    if origin.keys().isdisjoint(STORE) and (url := running_url(settings.data_dir)):
        settings = settings.model_copy(update={"redis_url": url})
        origin["redis_url"] = "running store"
    return Given(settings, origin)


def _annotation(name: str) -> Any:
    """Make a setting's flag; it takes text, so that what is wrong with it is said by the settings themselves."""
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    boolean = field.annotation is bool
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if boolean else flag,
        envvar=ENVIRONMENT_PREFIX + name.upper(),
        show_envvar=False,
        metavar=None if boolean else _metavar(field.annotation),
        help=f"{field.description} (default {_text(field.default)})",
        rich_help_panel=PANEL,
    )
    return Annotated[bool | None if boolean else str | None, option]


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return class_text(value) if isinstance(value, tuple) else str(value)


def class_text(classes: tuple[FeedbackClass, ...]) -> str:
    """Write feedback classes as the setting takes them: the preset's name if they are one, else JSON."""
    preset = next((name for name, known in CLASS_PRESETS.items() if known == classes), None)
    return preset or json.dumps([c.model_dump() for c in classes])
