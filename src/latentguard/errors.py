"""Everything that latentguard raises on purpose.

* LatentGuardError
  x PromptError      a row, a file or a column of prompts cannot be used
  x TemplateError    the instruction cannot be located in the chat template
  x ModelError       a model cannot be found or loaded, or is of an unsupported kind
    + ModelMismatch  a guard meets another model than the one it was fitted on
  x GuardError       a guard cannot be fitted, calibrated, saved or loaded
  x StudyError       the store or the judge model of a study fails
  x MissingExtra     a package of an optional extra is not installed

Each message is one sentence or two: what was expected, what was found, what to do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LatentGuardError(Exception):
    """The parent of every error that latentguard raises on purpose.

    Examples:
        >>> try:
        ...     lg.load_contrast("trian")
        ... except lg.LatentGuardError as error:
        ...     print(error)
        The built-in prompts have no split 'trian'; expected one of train, validation, ...
    """


class PromptError(LatentGuardError):
    """A row, a file or a column of prompts cannot be used."""


class TemplateError(LatentGuardError):
    """The user's instruction cannot be located in the chat template."""


class ModelError(LatentGuardError):
    """A model cannot be found or loaded, or is of an unsupported kind."""


class ModelMismatch(ModelError):
    """A guard meets another model than the one it was fitted on."""


class GuardError(LatentGuardError):
    """A guard cannot be fitted, calibrated, saved or loaded."""


class StudyError(LatentGuardError):
    """The store or the judge model of a study fails: the run stops, and goes on when run again."""


class MissingExtra(LatentGuardError):
    """A package that belongs to an optional extra is not installed."""


def require_extra(package: str, extra: str, purpose: str) -> Any:
    """Import a package of an optional extra.

    Args:
        package: The module to import, such as ``plotly.graph_objects``.
        extra: The extra of ``pyproject.toml`` that it belongs to, such as ``report``.
        purpose: What needs it, as the subject of a sentence.

    Returns:
        The module.

    Raises:
        MissingExtra: if it, or a package that it needs, is not installed.
    """
    try:
        import_module(package.split(".", maxsplit=1)[0])
        return import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).split(".")[0]
        raise MissingExtra(
            f"{purpose} needs the extra '{extra}' ({missing} is not installed): "
            f"pip install 'latentguard[{extra}]'"
        ) from None
