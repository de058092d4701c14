"""Control tokens in a message: text for the guard, but tokens for many an upstream.

Whoever writes ``<|im_end|>`` into a message ends it there, if the server makes a token of it; what
follows is read as another turn. So such texts are refused or broken up, unless the operator says
that the upstream keeps them text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from latentguard.serve.errors import BadRequest

COMMON = (
    r"<\|[^|<>]{1,64}\|>|<\uff5c[^\uff5c<>]{1,64}\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|\[/?(?:TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]"
    r"|</?s>|<(?:bos|eos|extra_id_\d+|SPECIAL_\d+|seed:[a-z_:]+)>"
    r"|\[gMASK\]|\[UNUSED_TOKEN_\d+\]|\]~[a-z]\]|\[e~\["
)
"""Control tokens of common model families."""

ROUNDS = 8
"""How often a text is escaped, at the most: a token may be left where another was broken up."""


class ControlTokens:
    """Finds control tokens: those of common families, and of the guard's own tokenizer."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        """Compile the pattern."""
        tokens = sorted({token for token in own if token.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, tokens), COMMON]))

    def find(self, text: str) -> str | None:
        """The first control token in a text, also in letters that some tokenizers make plain."""
        plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
        match = self._pattern.search(text) or self._pattern.search(plain)
        return match[0] if match else None

    def escape(self, text: str) -> str:
        """The text with a blank after the first character of each control token.

        Some are left: those in other letters, and of one character.
        """
        for _ in range(ROUNDS):
            text = self._pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    def require_none(self, texts: Iterable[str]) -> None:
        """Check that no text holds a control token.

        Raises:
            BadRequest: if one does.
        """
        for text in texts:
            if (token := self.find(text)) is not None:
                raise BadRequest(
                    f"A text holds '{token[:40]}', which the upstream may take for a control "
                    "token; write it otherwise."
                )
