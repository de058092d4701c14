"""A guardrail with the interface of any-guardrail.

```python
from latentguard.integrations.any_guardrail import LatentGuardrail

guardrail = LatentGuardrail("http://127.0.0.1:8400", api_key="KEY")
guardrail.validate("How do I kill a Python process?").valid
```
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

from any_guardrail.base import Guardrail
from any_guardrail.taxonomy import (
    BackendType,
    GuardrailCategory,
    GuardrailMetadata,
    GuardrailStage,
    OutputShape,
)
from any_guardrail.types import CategoryResult, GuardrailOutput, GuardrailUsage

from latentguard.integrations.service_client import GuardService, ServedVerdict


class LatentGuardrail(Guardrail):
    """A probe of a chat model's hidden states, with a calibrated false-positive rate."""

    METADATA = GuardrailMetadata(
        description="A probe of a chat model's hidden states, with a calibrated false-positive "
        "rate.",
        display_name="latentguard",
        categories=frozenset({GuardrailCategory.CONTENT_SAFETY}),
        primary_category=GuardrailCategory.CONTENT_SAFETY,
        stages=frozenset({GuardrailStage.INPUT}),
        output_shapes=frozenset({OutputShape.BINARY, OutputShape.SCORE}),
        backend=BackendType.HOSTED_API,
        supports_batch=True,
        vendor="latentguard",
        default_license="apache-2.0",
    )

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        """Prepare.

        Args:
            base_url: Where ``latentguard serve`` listens.
            api_key: Its API key, if it asks for one.
            timeout: Seconds for one request.
        """
        self._service = GuardService(base_url, key=api_key, timeout=timeout)

    @overload
    def validate(self, input_text: str) -> GuardrailOutput: ...

    @overload
    def validate(self, input_text: list[str]) -> list[GuardrailOutput]: ...

    def validate(self, input_text: str | list[str]) -> GuardrailOutput | list[GuardrailOutput]:
        """The verdict on a text, or on each of several texts.

        Raises:
            LatentGuardError: if the service gives none.
        """
        began = time.perf_counter()
        texts = [input_text] if isinstance(input_text, str) else input_text
        outputs = self._stamped(self._service.score_texts(texts), began)
        return outputs[0] if isinstance(input_text, str) else outputs

    def validate_chat(self, messages: Sequence[Mapping[str, Any]]) -> GuardrailOutput:
        """The verdict on a chat of messages in OpenAI's schema.

        Raises:
            LatentGuardError: if the service gives none.
        """
        began = time.perf_counter()
        return self._stamped([self._service.score_chat(messages)], began)[0]

    def _stamped(self, verdicts: list[ServedVerdict], began: float) -> list[GuardrailOutput]:
        milliseconds = 1000 * (time.perf_counter() - began)
        return [_output(verdict, milliseconds) for verdict in verdicts]


def _output(verdict: ServedVerdict, milliseconds: float) -> GuardrailOutput:
    names = [verdict.category] if verdict.category else []
    return GuardrailOutput(
        valid=not verdict.flagged,
        score=verdict.probability,
        categories=[CategoryResult(name=name, triggered=verdict.flagged) for name in names],
        action="block" if verdict.flagged else None,
        usage=GuardrailUsage(model_id=verdict.guard, latency_ms=milliseconds),
        extra=dict(verdict.fields),
        raw=dict(verdict.fields),
    )
