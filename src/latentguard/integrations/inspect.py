"""A scorer for Inspect AI: an evaluation logs what the guard says of each sample's prompt.

```python
from inspect_ai import Task
from latentguard.integrations.inspect import belief

Task(dataset=..., solver=generate(), scorer=belief("http://127.0.0.1:8400"))
```
"""

from __future__ import annotations

from inspect_ai.model import ChatMessage
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from latentguard.integrations.service_client import GuardService


@scorer(metrics=[mean(), stderr()])
def belief(url: str, *, key: str | None = None, timeout: float = 60.0) -> Scorer:
    """Score a sample 1 if the guard flags its prompt, else 0; the beliefs are in the metadata.

    The prompt is the chat up to the model's last reply. The mean is the share that is flagged.

    Args:
        url: Where ``latentguard serve`` listens.
        key: Its API key, if it asks for one.
        timeout: Seconds for one sample.

    Raises:
        LatentGuardError: while scoring, if the service gives no verdict; Inspect notes the error.
    """
    service = GuardService(url, key=key, timeout=timeout)

    async def score(state: TaskState, target: Target) -> Score:
        verdict = await service.score_chat_async(_chat_to_judge(state.messages))
        fields = {name: value for name, value in verdict.fields.items() if value is not None}
        return Score(
            value=float(verdict.flagged),
            answer="flagged" if verdict.flagged else "not flagged",
            metadata=fields | {"guard": verdict.guard},
        )

    return score


def _chat_to_judge(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """The chat without the replies that came after the last words of a user or a tool."""
    chat = [{"role": m.role, "content": m.text} for m in messages if m.text]
    while chat and chat[-1]["role"] in ("assistant", "system"):
        chat.pop()
    return chat
