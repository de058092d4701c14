"""Replies that a client has judged: chats that end with the assistant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_type_hints

from pydantic import create_model

from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyProbe, ReplyVerdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.segments import Segments
from latentguard.prompts import Message, Prompt, Reply
from latentguard.serve.errors import ApiError
from latentguard.serve.messages import ChatMessage
from latentguard.serve.service import RequestContext

ReplyFields = create_model(  # type: ignore[call-overload]
    "ReplyFields",
    **{name: (kind, ...) for name, kind in get_type_hints(ReplyVerdict).items()},
    decision=(str, ...),
    threshold=(float, ...),
)
"""A verdict on a reply, as ``ReplyVerdict.to_dict`` writes it, with what its score is compared to.
"""


def last_reply(messages: Sequence[ChatMessage], prompt: Prompt) -> Reply | None:
    """What the assistant says last, to the chat up to the user's last message; None if nothing.

    Args:
        messages: The chat.
        prompt: The chat up to the last message of a user or a tool, as it is read in context.
    """
    texts = list[str]()
    for message in reversed(messages):
        if message.text.strip():
            if message.speaker != "assistant":
                break
            texts.append(message.text)
    return Reply(prompt, "\n\n".join(reversed(texts))) if texts else None


async def score_last_reply(
    context: RequestContext, messages: Sequence[ChatMessage], prompt: Prompt
) -> ReplyVerdict | None:
    """The verdict on the reply that a chat ends with, recorded; None if nothing is judged.

    Raises:
        ApiError: if there is none though there should be one; this is recorded.
    """
    if context.served.guard.replies is None:
        return None
    reply = last_reply(messages, prompt)
    if reply is None:
        return None
    whole = Prompt(reply.text, history=(*prompt.history, Message("user", prompt.text)))

    def scan(guard: LatentGuard, model: ChatModel, _: Segments | None) -> ReplyVerdict:
        [verdict] = guard.scan_replies(model, [reply], progress=lambda count: None)
        return verdict

    try:
        verdict: ReplyVerdict = await context.service.engine.run_alone(
            whole, scan, account=context.account, served=context.served
        )
    except ApiError as error:
        await context.record_failure([prompt], error, is_answered=False)
        raise
    await context.record_reply(prompt, verdict, "score")
    return verdict


def reply_fields(judge: ReplyProbe, verdict: ReplyVerdict) -> dict[str, object]:
    """What an answer says of a reply."""
    return verdict.to_dict() | {"threshold": judge.threshold}
