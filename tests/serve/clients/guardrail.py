"""any-guardrail with the service as its moderation endpoint; reads JSON, prints JSON."""

import json
import sys

from any_guardrail import AnyGuardrail, GuardrailName

asked = json.load(sys.stdin)
guardrail = AnyGuardrail.create(
    GuardrailName.OPENAI_MODERATION, api_key="none", base_url=f"{asked['url']}/v1"
)
found = [guardrail.validate(text) for text in asked["texts"]]
told = [[one.valid, [c.name for c in one.categories if c.triggered]] for one in found]
json.dump(told, sys.stdout)
