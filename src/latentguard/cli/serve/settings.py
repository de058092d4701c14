"""The options of ``serve``: a TOML file, then the environment, then the command line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from latentguard.cli.serve.options import ServeOptions
from latentguard.errors import require_extra

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

PREFIX = "LATENTGUARD_SERVE_"
"""Of variables, as LATENTGUARD_SERVE_MAX_TOKENS."""

ONLY_GIVEN = ("config", "check")
"""Options of the command line alone; the file may also be named by the environment."""


def read_settings(arguments: Mapping[str, Any]) -> ServeOptions:
    """All options: those given, then of the environment, then of the file, then defaults.

    Args:
        arguments: What the command line has, by name.

    Raises:
        typer.BadParameter: if one is not known, or not what it should be.
    """
    require_extra("pydantic_settings", "serve", "latentguard serve")
    from pydantic import ValidationError

    variable = os.environ.get(f"{PREFIX}CONFIG")
    file = arguments.get("config") or (Path(variable) if variable else None)
    rows = _read_file(file) if file else {}
    _require_known_variables()
    shared = {name: value for name, value in arguments.items() if name not in ONLY_GIVEN}
    try:
        settings = _settings_class(rows)(**shared)
    except ValidationError as error:
        raise typer.BadParameter(_explain(error, arguments, file)) from None
    return ServeOptions(config=file, check=arguments.get("check", False), **settings.model_dump())


def _read_file(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise typer.BadParameter(f"{file} is not TOML: {error}.") from None
    rows = {name.replace("-", "_"): value for name, value in content.items()}
    if len(rows) < len(content):
        raise typer.BadParameter(f"{file} names an option twice, with '-' and with '_'.")
    return rows


def _require_known_variables() -> None:
    names = {field.name for field in fields(ServeOptions)} - {"check"}
    for variable in os.environ:
        if variable.startswith(PREFIX) and variable.removeprefix(PREFIX).lower() not in names:
            raise typer.BadParameter(f"{variable} is not an option of serve; check its spelling.")


def _settings_class(rows: dict[str, Any]) -> type[BaseSettings]:
    """The options as pydantic checks them; a file has these rows."""
    from pydantic import create_model
    from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict

    class Sources(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, extra="forbid", enable_decoding=False, allow_inf_nan=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, rows)

    return create_model("Settings", __base__=Sources, **_checked_fields())


def _checked_fields() -> dict[str, Any]:
    """The type, the limits and the default of each option, as the command line has them."""
    from pydantic import BeforeValidator, Field

    values = dict[str, Any]()
    hints = get_type_hints(ServeOptions, include_extras=True)
    for field in fields(ServeOptions):
        if field.name in ONLY_GIVEN:
            continue
        kind, option = get_args(hints[field.name])
        if kind == list[str]:
            kind = Annotated[list[str], BeforeValidator(_split)]
        default: Any = field.default
        limits = Field(default, ge=getattr(option, "min", None), le=getattr(option, "max", None))
        values[field.name] = kind, limits
    return values


def _split(value: Any) -> Any:
    """``a,b`` and ``["a,b", "c"]`` are lists of names, too."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _explain(error: ValidationError, arguments: Mapping[str, Any], file: Path | None) -> str:
    """Each mistake with the place where it was made."""
    reasons = []
    for mistake in error.errors(include_url=False):
        name = str(mistake["loc"][0])
        variable = f"{PREFIX}{name.upper()}"
        place = f"{file}, {name.replace('_', '-')}"
        if name in arguments and name not in ONLY_GIVEN:
            place = f"--{name.replace('_', '-')}"
        elif variable in os.environ:
            place = variable
        if mistake["type"] == "extra_forbidden":
            reasons.append(f"{place}: there is no such option")
        else:
            reasons.append(f"{place}: {mistake['msg']}; found {mistake['input']!r}")
    return "; ".join(reasons)
