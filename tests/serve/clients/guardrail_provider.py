"""any-guardrail's interface with the service behind it; reads JSON, prints JSON."""

import json
import sys

from any_guardrail.base import Guardrail, GuardrailOutput

from latentguard.integrations.any_guardrail import LatentGuardrail

asked = json.load(sys.stdin)
guardrail = LatentGuardrail(asked["url"])
assert isinstance(guardrail, Guardrail)
found = guardrail.validate(asked["texts"])
assert all(isinstance(one, GuardrailOutput) for one in found)
alone = guardrail.validate(asked["texts"][0])
chat = guardrail.validate_chat([{"role": "user", "content": text} for text in asked["texts"]])
try:
    LatentGuardrail("http://127.0.0.1:9").validate("a")
    error = None
except Exception as raised:
    error = str(raised)
told = dict(
    valid=[one.valid for one in found],
    scores=[one.score for one in found],
    alone=alone.valid,
    chat=chat.valid,
    json=len(found[0].model_dump_json()) > 0,
    latency=found[0].usage.latency_ms > 0,
    error=error,
)
json.dump(told, sys.stdout)
