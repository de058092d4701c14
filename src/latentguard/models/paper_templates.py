"""Table 4: the prompt templates of the paper, for the three families of models that it studies.

They have no default system prompt, and line breaks of their own. Where the table, which breaks its
lines to fit the page, leaves a break open, the number of post-instruction tokens in Figure 14
decides: five for Llama-3, four for Qwen2 and Llama-2. The token that begins a text is there where
the family's tokenizer adds it, as it did in the authors' runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentguard.errors import TemplateError

SLOT = "{instruction}"
"""Stands for the user's instruction in a plain template."""


@dataclass(frozen=True)
class NamedTemplate:
    """A plain template and where it comes from."""

    name: str
    """Such as ``Table 4, Qwen2``."""

    text: str
    """Holds ``{instruction}`` once."""

    has_bos: bool = False
    """Whether the tokenizer's beginning-of-text token stands in front."""

    @property
    def jinja(self) -> str:
        """The same for ``apply_chat_template``; it takes one message of the user and no other.

        Raises:
            TemplateError: if the text does not hold ``{instruction}`` exactly once.
        """
        if self.text.count(SLOT) != 1:
            raise TemplateError(
                f"A template should hold {SLOT} once; found it {self.text.count(SLOT)} times."
            )
        before, after = self.text.split(SLOT)
        parts = [_quoted(before), "messages[0].content", _quoted(after)]
        if self.has_bos:
            parts.insert(0, "(bos_token or '')")
        return (
            "{% if messages|length != 1 or messages[0].role != 'user' %}"
            "{{ raise_exception('this template takes one message, of the user') }}{% endif %}"
            f"{{{{ {' + '.join(parts)} }}}}"
        )


TABLE_4: Mapping[str, NamedTemplate] = {
    "llama-2": NamedTemplate("Table 4, Llama-2", f"[INST] {SLOT} [/INST]", has_bos=True),
    "llama-3": NamedTemplate(
        "Table 4, Llama-3",
        f"<|start_header_id|>user<|end_header_id|>\n{SLOT}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n",
        has_bos=True,
    ),
    "qwen2": NamedTemplate(
        "Table 4, Qwen2", f"<|im_start|>user\n{SLOT}<|im_end|>\n<|im_start|>assistant"
    ),
}
"""By family."""


def paper_template(model_type: str, tokenizer: Any) -> NamedTemplate | None:
    """The template of Table 4 for a model of one of its families; None for any other.

    Args:
        model_type: That of the model's configuration, such as ``qwen2``.
        tokenizer: The model's; models of other makers share the type ``llama``, so its control
            tokens, or its own template, must be the family's.
    """
    vocabulary = tokenizer.get_vocab()
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if model_type == "qwen2" and "<|im_start|>" in vocabulary:
        return TABLE_4["qwen2"]
    if model_type == "llama" and "<|start_header_id|>" in vocabulary:
        return TABLE_4["llama-3"]
    if model_type == "llama" and "[INST]" in own and "[INST]" not in vocabulary:
        return TABLE_4["llama-2"]
    return None


def _quoted(text: str) -> str:
    """The text as a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
