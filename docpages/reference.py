"""Reference pages that are generated from the code: CLI, API, HTTP, metrics, configuration."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
import typer
from fastapi.testclient import TestClient

import latentguard
from docpages.markdown_table import plain_table
from latentguard.cli.app import app
from latentguard.serve.config import ServeConfig
from latentguard.serve.server import create_server

VARIABLES = {
    "LATENTGUARD_API_KEYS": "API keys of `serve`, with commas between; instead of `--api-keys`.",
    "LATENTGUARD_ADMIN_KEY": "For `/reload`, `/promote`, `/rollback`, `/shadow` (health port).",
    "LATENTGUARD_SERVE_OPTION": "Any option of `serve` by its name, as LATENTGUARD_SERVE_QUEUE.",
    "LATENTGUARD_UPSTREAM_KEY": "Key that `serve` shows the upstream.",
    "HF_HOME": "Cache of the Hugging Face Hub.",
    "HF_HUB_OFFLINE": "`1` asks the Hub for nothing.",
}
"""Environment variables, and what they set."""


def write_reference(folder: Path) -> None:
    """Write every generated page; an equal page keeps its time."""
    for name, make in PAGES.items():
        text = f"{make().rstrip()}\n"
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown, of texts that may hold its marks."""
    return plain_table(head, [[*map(_cell, row)] for row in rows])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


# ---- command line


def cli_page() -> str:
    """Every verb with its options, as ``--help`` has them."""
    root: Any = typer.main.get_command(app)
    text = (
        "# Command line\n\nGenerated from the program. `latentguard VERB --help` prints the same.\n"
    )
    return text + "\n".join(_verb(name, command) for name, command in _verbs(root, ""))


def _verbs(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _verb(name: str, command: Any) -> str:
    prose, example = _split_example(inspect.cleandoc(command.help))
    visible = [one for one in command.params if not one.hidden and one.name != "help"]
    arguments = [one for one in visible if one.param_type_name == "argument"]
    usage = " ".join(["latentguard", name, *map(_argument, arguments)])
    rows = [(_names(one), one.help or "", _default(one)) for one in visible]
    blocks = [
        f"\n## {name}\n",
        f"{prose}\n",
        f"```bash\n{usage} [OPTIONS]\n{example}\n```\n",
        f"{table(('option', 'what', 'default'), rows)}\n",
    ]
    return "\n".join(blocks)


def _split_example(text: str) -> tuple[str, str]:
    prose, _, example = text.partition("Example: ")
    return prose.strip(), example.strip()


def _argument(one: Any) -> str:
    name = one.name.upper()
    return name if one.required else f"[{name}]"


def _names(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{one.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))


def _default(one: Any) -> str:
    if one.required:
        return "required"
    if one.default in (None, "", (), []) or callable(one.default):
        return ""
    return f"`{one.default}`"


# ---- Python


def api_page() -> str:
    """The public names, with their docstrings."""
    names = "\n\n".join(
        f"::: {module}.{name}" for name, module in sorted(latentguard._MODULES.items())
    )
    return (
        "# Python\n\n"
        "Generated from docstrings. These are the public names: "
        "`import latentguard as lg`, then `lg.load_guard`.\n\n" + names
    )


# ---- service


def _client() -> TestClient:
    """Of a service whose guard is never loaded: it describes itself without one."""
    config = ServeConfig(probe_upstream=False)
    return TestClient(create_server(_no_guard, config).config.app)


def _no_guard() -> Any:
    raise NotImplementedError("The pages need no guard.")


def http_page() -> str:
    """Endpoints and bodies, from the service's OpenAPI document."""
    document = _client().get("/openapi.json").json()
    blocks = [
        "# HTTP",
        "Generated from the service's OpenAPI document, which it serves at `/openapi.json`. "
        "[Serve a guard](../how-to/serving.md) shows requests. "
        "Every error has the body [ErrorResponse](#errorresponse).",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            blocks.append(_operation(method, path, operation))
    blocks.append("## Bodies")
    for name, schema in sorted(document.get("components", {}).get("schemas", {}).items()):
        blocks.append(_schema(name, schema))
    return "\n\n".join(blocks)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    answer = operation["responses"].get("200", {}).get("content", {})
    lines = [f"## {method.upper()} {path}", operation.get("description", "")]
    if body:
        lines.append(f"Body: {', '.join(map(_body, body.values()))}.")
    if answer:
        lines.append(f"Answer: {', '.join(map(_body, answer.values()))}.")
    return "\n\n".join(filter(None, lines))


def _body(content: Mapping[str, Any]) -> str:
    return _type(content.get("schema", {}))


def _type(schema: Mapping[str, Any]) -> str:
    """What a JSON schema says of a value, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[key])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"`{field}`",
            _type(value),
            value.get("description", ""),
            "required" if field in required else _json(value.get("default")),
        )
        for field, value in schema.get("properties", {}).items()
    ]
    head = f"### {name}\n\n{schema.get('description', '')}\n\n"
    return head + (table(("field", "type", "what", "default"), rows) if rows else _type(schema))


def _json(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def metrics_page() -> str:
    """Metrics as the service writes them, with their help texts."""
    page = _client().get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)", page, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\w+) (.*)", page, re.MULTILINE))
    rows = [
        (f"`{name}`", kind, helps[name])
        for name, kind in kinds.items()
        if name.startswith("latentguard_") and not name.endswith("_created")
    ]
    return (
        "# Metrics\n\n"
        "Generated from `GET /metrics`, in Prometheus' format. "
        "[Operate the service](../how-to/operate.md#watch-it) says what to watch.\n\n"
        + table(("metric", "kind", "what"), rows)
    )


# ---- configuration


def configuration_page() -> str:
    """Fields of the records that configure a study and a service."""
    package: Any = griffe.load(
        "latentguard", search_paths=[str(Path(latentguard.__path__[0]).parent)]
    )
    variables = [(f"`{name}`", what) for name, what in VARIABLES.items()]
    return "\n\n".join(
        [
            "# Configuration",
            "Generated from the code.",
            "## Environment variables",
            table(("variable", "what"), variables),
            "## Study: `--config study.toml`",
            "Every field may stand at the top of the file. A field that the program does not "
            "know is an error.",
            _fields(package["study.settings.Settings"]),
            "## Service",
            "Options of `latentguard serve` set these fields.",
            _fields(package["serve.config.ServeConfig"]),
        ]
    )


def _fields(record: Any) -> str:
    rows = [
        (
            f"`{name}`",
            str(member.annotation),
            member.docstring.value.replace("``", "`") if member.docstring else "",
            f"`{member.value}`" if member.value is not None else "required",
        )
        for name, member in record.members.items()
        if member.is_attribute and "property" not in member.labels
    ]
    return table(("field", "type", "what", "default"), rows)


PAGES: dict[str, Callable[[], str]] = {
    "cli": cli_page,
    "api": api_page,
    "http": http_page,
    "metrics": metrics_page,
    "configuration": configuration_page,
}
"""File in docs/reference -> what makes it."""
