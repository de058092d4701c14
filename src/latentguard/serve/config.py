"""How a service behaves: one frozen record, made by the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Policy = Literal["block", "annotate", "shadow"]
OnReview = Literal["pass", "annotate", "block"]
Fsync = Literal["never", "interval", "always"]

ReplyPolicy = Literal["cut", "block", "annotate", "shadow"]
"""What happens to a flagged reply."""

Source = Literal["user", "system", "assistant", "tool", "call", "schema"]
"""Whose text it is: a user's; instructions of system or developer; an assistant's; what a tool
returned; names and arguments with which tools are called; what tools and schemas say."""

SOURCES: tuple[Source, ...] = get_args(Source)

RateOf = Literal["chat", "text"]
"""What the false-positive rate is of: a whole chat, or each text that is read of it."""

ToolPolicy = Literal["read", "refuse", "trust"]
"""What is done with tools and schemas: each text in them is read; they are refused; the gateway
that adds them is trusted."""

ControlTokenPolicy = Literal["refuse", "escape", "forward"]
"""Messages with control tokens are refused, sent with a blank in each token, or sent as they are,
since the upstream is known to take them for text."""


@dataclass(frozen=True)
class ServeConfig:
    """Policies and limits of a service."""

    guard: str | None = None
    """Where the guard is read from; the audit log names its folder."""

    shadow: str | None = None
    """Where the shadow guard is read from, if there is one."""

    policy: Policy = "block"
    """What happens to a flagged chat: refused; answered with its scores; answered, only logged."""

    on_review: OnReview = "annotate"
    """What happens to a chat in the band to review: answered, only logged; answered with its
    decision; refused like a flagged one."""

    reply_policy: ReplyPolicy | None = None
    """What happens to a flagged reply, if the guard judges replies (``reply_reading``); None cuts
    it, or does as ``policy`` where that is softer."""

    hold_tokens: int = 8
    """Tokens of a reply that are read beyond one until it is shown."""

    refusal: str = "I'm sorry, but I can't help with that."
    """What a blocked chat is answered with."""

    trusted_roles: tuple[str, ...] = ()
    """Roles whose messages a gateway writes, not the client: these are read in context only."""

    sources: tuple[Source, ...] = SOURCES
    """Whose texts are read; those of others are at most the context of these."""

    rate_of: RateOf = "chat"
    """Whether the false-positive rate is of a whole chat, whose texts share it, or of each text."""

    tools: ToolPolicy = "read"
    """Whether the texts of tools and schemas are read, refused, or trusted as a gateway's own."""

    control_tokens: ControlTokenPolicy = "refuse"
    """What is done with control tokens in a chat for an upstream."""

    unread_parameters: tuple[str, ...] = ()
    """Parameters that an upstream is sent unread, beside those that are known to hold no text."""

    segment_header: str | None = None
    """The request header that names the segment of the traffic; None judges all by the common
    thresholds. Whoever sets it picks the threshold, so it has to come from a gateway."""

    name: str = "latentguard"
    """What the served model is called."""

    upstream: str | None = None
    """An OpenAI-compatible service that answers chats, such as ``http://host:8000/v1``; None
    answers them with the guard's own model."""

    admin_key: str | None = None
    """What lets a client reload guards and keys, and promote a shadow guard, at the health port;
    None lets nobody."""

    review_labels: str | Path | None = None
    """Where labels of the page at ``/review`` are written; None: there is no such page."""

    upstream_key: str | None = None
    """What the upstream is shown instead of the client's own key."""

    upstream_key_header: str = "authorization"
    """The header with that key; ``authorization`` says ``Bearer`` before it."""

    upstream_chat_path: str = "chat/completions"
    """Where chats go, below the upstream's URL; ``{model}`` is the request's model."""

    upstream_responses_path: str = "responses"
    """Where requests of the Responses API go, below the upstream's URL; ``{model}`` as above."""

    upstream_models_path: str = "models"
    """Where it lists its models, below its URL; also asked whether it is there."""

    upstream_connect_seconds: float = 10.0
    """Seconds to connect to the upstream."""

    upstream_read_seconds: float = 120.0
    """Seconds until the upstream's answer begins, or the next piece of it comes."""

    probe_upstream: bool = True
    """Whether the service is not ready while the upstream cannot be reached."""

    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have; all, if there are none."""

    wait: float = 0.003
    """Seconds that the first prompt of a batch may wait for others."""

    batch_tokens: int | None = None
    """Tokens scored together; None is what the model takes in one pass."""

    segment_tokens: int | None = None
    """Tokens that are read at once while several clients share the model; None suits the device."""

    queue: int = 256
    """Prompts that may wait; more are turned away with 429."""

    concurrency: int = 512
    """Requests of one client that may be under way; a client is a key, or an address without keys.
    """

    rate: float | None = None
    """Requests of one client in a second, in the long run; None for no limit."""

    burst: int = 20
    """Requests of one client that may come at once after a pause, where there is a rate."""

    redis: str | None = None
    """Where requests of clients are counted for several processes together, as
    ``redis://host:6379/0``; None counts them in each process."""

    max_elements: int = 20_000
    """Values in a request's JSON; more are turned away before they are looked at."""

    chats: int = 8
    """Chats that are answered at the same time, a token each in turn."""

    max_tokens: int = 4096
    """Tokens of one prompt; longer ones are turned away with 413."""

    max_reply: int = 1024
    """Tokens of one reply."""

    max_inputs: int = 128
    """Prompts of one request."""

    max_readings: int = 256
    """Texts of one chat that are read, each by itself."""

    health_host: str = "127.0.0.1"
    """Where health and metrics are served."""

    health_port: int | None = None
    """Their port; None serves them beside the rest only."""

    max_connections: int = 1024
    """Open connections; more are cut."""

    max_connections_per_address: int = 512
    """Open connections from one address; more are cut."""

    max_body: int = 1 << 20
    """Bytes of a request's body."""

    max_header: int = 16 << 10
    """Bytes of a request's headers."""

    deadline: float = 30.0
    """Seconds after which a prompt that was not scored is given up with 503."""

    read_seconds: float = 10.0
    """Seconds in which a client has to send its headers, and then its body."""

    write_seconds: float = 30.0
    """Seconds that a client may stop reading an answer."""

    stall: float = 300.0
    """Seconds after which one pass counts as stuck, and the process exits."""

    close_delay: float = 0.0
    """Seconds between SIGTERM, when it is no longer ready, and the end of new connections."""

    drain: float = 30.0
    """Seconds that requests have to finish after SIGTERM."""

    @property
    def on_flagged_reply(self) -> ReplyPolicy:
        """What happens to a flagged reply."""
        return self.reply_policy or ("cut" if self.policy == "block" else self.policy)
