"""Everything that latentguard raises on purpose.

* LatentGuardError
  x PromptError      a row, a file or a column of prompts cannot be used
  x TemplateError    the instruction cannot be located in the chat template
  x ModelError       a model cannot be found or loaded, or is of an unsupported kind
    + ModelMismatch  a guard meets another model than the one it was fitted on
  x GuardError       a guard cannot be fitted, calibrated, saved or loaded
  x StudyError       the store or the judge model of a study fails

Each message is one sentence or two: what was expected, what was found, what to do.
"""


class LatentGuardError(Exception):
    """The parent of every error that latentguard raises on purpose."""


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
