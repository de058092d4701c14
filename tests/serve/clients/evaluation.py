"""An Inspect evaluation of some prompts with the scorer; reads JSON, prints what its log holds."""

import json
import sys

import inspect_ai
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, get_model
from inspect_ai.solver import solver

from latentguard.integrations.inspect import belief


@solver
def reply():
    """A solver that needs no model: Inspect would fetch a tokenizer to count tokens."""

    async def solve(state, generate):
        state.messages.append(ChatMessageAssistant(content="Certainly."))
        return state

    return solve


asked = json.load(sys.stdin)
task = inspect_ai.Task(
    dataset=[Sample(input=text, target="none") for text in asked["texts"]],
    solver=reply(),
    scorer=belief(asked["url"], key=asked["key"]),
)
(log,) = inspect_ai.eval(
    task, model=get_model("mockllm/model"), log_dir=asked["folder"], display="none"
)
scores = [sample.scores["belief"] for sample in log.samples or [] if sample.scores]
told = dict(
    status=log.status,
    error=log.error.message if log.error else None,
    values=[score.value for score in scores],
    beliefs=[score.metadata["beliefs"] for score in scores],
    mean=log.results.scores[0].metrics["mean"].value if log.results else None,
)
json.dump(told, sys.stdout)
