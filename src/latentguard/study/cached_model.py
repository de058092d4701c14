"""CachedModel: the model under study, with a memory of what it held and what it said.

Every experiment asks the cached model; it asks the model itself only for what the store lacks, in
fixed chunks, each kept as it is done. So a killed study goes on where it stopped, batches are the
same as in an unbroken run, and experiments share states and replies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.interventions import Ablation, Edit, Intervention, Knockout
from latentguard.models.thinking_places import CLOSE, OPEN
from latentguard.prompts import Prompt, Reply
from latentguard.states import Progress, Speaker, States
from latentguard.study.belief_weights import weighted_beliefs
from latentguard.study.judge import Answer, Judge, answer, judge, refused
from latentguard.study.store import Store, key_of

THINKING_POSITIONS = ("last thought", "after thinking")
"""Positions in a reply: the last token of its thinking, and the first token behind it."""

STATES_AT_ONCE = 128
"""Prompts whose states are kept together."""

REPLIES_AT_ONCE = 512
"""Replies that are kept together."""

REPLIES_READ_AT_ONCE = 24
"""Replies whose beliefs at each token are kept together."""

PROMPTS_AT_ONCE = 8
"""Prompts that are steered together at least; many settings of them are kept bit by bit."""

T = TypeVar("T")

Step = Callable[[str, int], Progress]
"""Opens a step of so many prompts or replies on the progress bar."""


class Finetune(Protocol):
    """Opens the model fine-tuned on (prompt, opening) pairs; on leaving it is as it was."""

    def __call__(
        self, pairs: Sequence[tuple[Prompt, str]], *, seed: int, reply_tokens: int | None = None
    ) -> AbstractContextManager[Speaker]:
        """Train on the openings alone, or on so many tokens of replies; ``seed`` orders them."""


class Suffix(Protocol):
    """Searches a GCG suffix that makes the model begin its reply with a target."""

    def __call__(self, prompt: Prompt, target: str, *, steps: int, seed: int) -> str:
        """The suffix found after so many steps, white space in front included."""


class Unsafe(Protocol):
    """P(unsafe) of prompts by a baseline guard model, [n]."""

    def __call__(
        self, prompts: Sequence[Prompt], *, progress: Progress | None = None
    ) -> list[float]:
        """In the order of the prompts."""


@dataclass(frozen=True)
class Tools:
    """What only the model's own package can do; None where it is not at hand."""

    finetune: Finetune | None = None
    """The fine-tuning attack (section 5.2)."""

    suffix: Suffix | None = None
    """GCG, through nanogcg."""

    guards: dict[str, Unsafe] = field(default_factory=dict)
    """Baseline guard models by name (Table 3)."""


class CachedModel:
    """A model and its memory."""

    def __init__(
        self,
        model: Speaker,
        store: Store,
        *,
        step: Step | None = None,
        tools: Tools | None = None,
        judge: Judge = judge,
        second_judge: Judge | None = None,
        answer: Callable[[Reply], Answer] = answer,
    ) -> None:
        """Wrap a model.

        Args:
            model: The model.
            store: Where what it does is kept.
            step: Opens a step on a progress bar.
            tools: Attacks and baseline guards.
            judge: Says whether a reply is a refusal.
            second_judge: Says it too, for a column of its own; it decides nothing.
            answer: Says what a reply to an inversion question is.
        """
        self.uncached, self.store, self.tools, self.judge = model, store, tools or Tools(), judge
        self.second_judge, self.answer = second_judge, answer
        # a speaker without a chat template opens no thinking
        self.opens_thinking = bool(getattr(model, "opens_thinking", False))
        self.may_think = bool(getattr(model, "may_think", False))
        self.step: Step = step or (lambda what, total: lambda count: None)
        self.name = model.fingerprint.digest

    @property
    def depth(self) -> int:
        """Number of blocks L; layers run from 0 to L."""
        return self.uncached.depth

    @property
    def span(self) -> tuple[str, ...]:
        """t_inst and every position after it."""
        middle = (f"post+{k}" for k in range(1, self.uncached.post))
        return ("t_inst", *middle, "t_post")

    def states(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        what: str = "states",
    ) -> States:
        """States at all layers, [n p l d], in the order of the prompts; of no prompt, no rows.

        Raises:
            PromptError: if a prompt is empty, too long, or has no such position.
        """
        prompts = tuple(prompts)
        keys = {p: [self._state_key(p, at) for at in positions] for p in prompts}
        there = self.store.has(key for of in keys.values() for key in of)
        distinct = _each_once(keys)
        missing = [p for p in distinct if not there.issuperset(keys[p])]
        advance = self.step(what, len(distinct))
        advance(len(distinct) - len(missing))
        for chunk in _chunks(missing, STATES_AT_ONCE):
            self._capture(chunk, tuple(positions), keys, advance)
        return self._kept_states(prompts, tuple(positions), keys)

    def thinking_states(
        self, prompts: Iterable[Prompt], *, max_new_tokens: int, what: str = "thinking"
    ) -> States:
        """States where the thinking of the model's own replies ends, [n 2 l d].

        Of the prompts whose reply thinks to the end and then says something; the others are left
        out. A model whose template knows of no thinking is not asked.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        prompts = tuple(prompts) if self.may_think else ()
        (replies,) = self.replies(prompts, what=what, max_new_tokens=max_new_tokens)
        replies = [one for one in replies if CLOSE in one.text]
        keys = {one: self._thinking_keys(one) for one in replies}
        there = self.store.has(key for of in keys.values() for key in of)
        missing = [one for one in keys if not there.issuperset(keys[one])]
        advance = self.step(what, len(missing))
        for chunk in _chunks(missing, STATES_AT_ONCE):
            for reply, states in zip(chunk, self.uncached.capture_thinking(chunk), strict=True):
                values = [b"", b""] if states is None else [_to_bytes(one) for one in states]
                self.store.put(dict(zip(keys[reply], values, strict=True)))
            advance(len(chunk))
        records = self.store.get(key for of in keys.values() for key in of)
        thinking_keys = {one.prompt: keys[one] for one in replies if records[keys[one][0]]}
        return self._kept_states(tuple(thinking_keys), THINKING_POSITIONS, thinking_keys)

    def replies(
        self,
        prompts: Iterable[Prompt],
        interventions: Sequence[Edit | None] = (None,),
        *,
        what: str = "replies",
        max_new_tokens: int = 24,
        post: bool = True,
        watch: Sequence[str] = (),
    ) -> list[list[Reply]]:
        """Greedy replies under each intervention, a list in the order of the prompts for each.

        Args:
            prompts: What to reply to.
            interventions: How to steer or edit the run; None is unsteered.
            what: What the progress bar says.
            max_new_tokens: The longest reply.
            post: Keep the post-instruction tokens (Table 1).
            watch: Words whose log-probability as first word is wanted.

        Raises:
            PromptError: if a prompt is empty, too long, or has no question to stop before, or no
                vector where others have one of their own.
            ModelError: if a vector or a layer does not fit the model.
        """
        prompts = tuple(prompts)
        how: dict[str, Any] = dict(max_new_tokens=max_new_tokens, post=post, watch=list(watch))
        keys = {
            p: [
                key_of("reply", self.name, _messages_of(p), _digest(one, p), how)
                for one in interventions
            ]
            for p in prompts
        }
        count = len(interventions)
        there = self.store.has(key for of in keys.values() for key in of)
        every = _each_once(keys)
        missing = {p: [n for n, key in enumerate(keys[p]) if key not in there] for p in every}
        advance = self.step(what, len(every) * count)
        advance(len(every) * count - sum(map(len, missing.values())))
        for chunk in _chunks(every, max(PROMPTS_AT_ONCE, REPLIES_AT_ONCE // (count or 1))):
            for slots in _chunks(range(count), REPLIES_AT_ONCE // PROMPTS_AT_ONCE):
                slots_missing = {p: tuple(n for n in missing[p] if n in slots) for p in chunk}
                self._sweep(slots_missing, interventions, keys, how, advance)
        opening = OPEN if self.opens_thinking and post else ""
        return self._kept_replies(prompts, interventions, keys, opening)

    def opened(self, replies: Iterable[Sequence[Reply]]) -> list[list[Reply]]:
        """Replies of a sweep, each behind the thinking that the template opens, if it does."""
        opening = OPEN if self.opens_thinking else ""
        return [[replace(one, text=opening + one.text) for one in of] for of in replies]

    def continuation(self, reply: Reply) -> str:
        """What the model itself wrote of a reply: its text without an opening of the template."""
        return reply.text.removeprefix(OPEN) if self.opens_thinking else reply.text

    def reply_losses(self, replies: Sequence[Reply], *, what: str = "fluency") -> list[float]:
        """Mean loss of each reply's tokens behind its prompt, unsteered, in nats a token.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        keys = {
            reply: key_of("loss", self.name, _messages_of(reply.prompt), reply.ids)
            for reply in replies
        }
        there = self.store.has(keys.values())
        missing = list({key: r for r, key in keys.items() if key not in there}.values())
        advance = self.step(what, len(missing))
        for chunk in _chunks(missing, REPLIES_AT_ONCE):
            losses = self.uncached.reply_losses(chunk)
            pairs = zip(chunk, losses, strict=True)
            self.store.put({keys[reply]: json.dumps(loss).encode() for reply, loss in pairs})
            advance(len(chunk))
        records = self.store.get(keys.values())
        return [float(json.loads(records[keys[reply]])) for reply in replies]

    def reply_beliefs(
        self, replies: Sequence[Reply], weights: Float[Tensor, "a l d"], *, what: str = "replies"
    ) -> list[Float[NDArray[np.float32], "t a"]]:
        """Beliefs at t_post and at each token of replies but the end; the states are not kept.

        Args:
            replies: Read behind their prompts, whoever wrote them.
            weights: ``belief_weights`` of each of some axes.
            what: What the progress bar says.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        digest = _sha(weights)
        keys = [
            key_of("reply beliefs", self.name, _messages_of(one.prompt), one.ids, digest)
            for one in replies
        ]
        there = self.store.has(keys)
        by_key = dict(zip(keys, replies, strict=True))
        missing = {key: reply for key, reply in by_key.items() if key not in there}
        advance = self.step(what, len(by_key))
        advance(len(by_key) - len(missing))
        for chunk in _chunks(tuple(missing), REPLIES_READ_AT_ONCE):
            states = self.uncached.capture_replies([missing[key] for key in chunk])
            beliefs = [weighted_beliefs(one, weights) for one in states]
            self.store.put(dict(zip(chunk, map(_to_bytes, beliefs), strict=True)))
            advance(len(chunk))
        records = self.store.get(keys)
        return [np.frombuffer(records[k], np.float32).reshape(-1, len(weights)) for k in keys]

    def refused(self, replies: Iterable[Reply]) -> tuple[bool | None, ...]:
        """Whether each reply is a refusal; None where the judge cannot tell (empty or cut)."""
        return tuple(refused(self.judge(reply)) for reply in replies)

    def refused_by_second(self, replies: Iterable[Reply]) -> tuple[bool | None, ...] | None:
        """The same by the second judge; None if there is none."""
        if self.second_judge is None:
            return None
        return tuple(refused(self.second_judge(reply)) for reply in replies)

    def cached(self, parts: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """What ``compute`` returned when it was last asked for these parts; JSON types only."""
        key = key_of("memory", self.name, *parts)
        records = self.store.get([key])
        if key not in records:
            self.store.put({key: json.dumps(compute()).encode()})
        return json.loads(self.store.get([key])[key])

    def _capture(
        self,
        chunk: tuple[Prompt, ...],
        positions: tuple[str, ...],
        keys: dict[Prompt, list[str]],
        advance: Progress,
    ) -> None:
        states = States.collect(self.uncached.capture(chunk, positions=positions, progress=advance))
        self.store.put(
            {
                key: _to_bytes(states.values[row, slot])
                for row, prompt in enumerate(chunk)
                for slot, key in enumerate(keys[prompt])
            }
        )

    def _kept_states(
        self, prompts: tuple[Prompt, ...], positions: tuple[str, ...], keys: dict[Prompt, list[str]]
    ) -> States:
        dtype = getattr(torch, self.uncached.fingerprint.dtype.partition("/")[0])  # float32/int8
        layers = tuple(range(self.depth + 1))
        rows = []
        for prompt in prompts:
            records = self.store.get(keys[prompt])
            parts = [torch.frombuffer(bytearray(records[k]), dtype=dtype) for k in keys[prompt]]
            rows.append(torch.stack(parts).view(len(positions), len(layers), -1))
        none = torch.empty(0, len(positions), len(layers), 1, dtype=dtype)
        values = torch.stack(rows) if rows else none
        return States(values, prompts, positions, layers, self.uncached.fingerprint)

    def _sweep(
        self,
        slots_missing: dict[Prompt, tuple[int, ...]],
        interventions: Sequence[Edit | None],
        keys: dict[Prompt, list[str]],
        how: dict[str, Any],
        advance: Progress,
    ) -> None:
        """Ask some prompts, steered in the ways that each still wants."""
        for slots, group in groupby(slots_missing, key=slots_missing.__getitem__):
            if not slots:
                continue
            todo = [interventions[slot] for slot in slots]
            replies_by_slot = self.uncached.sweep(tuple(group), todo, progress=advance, **how)
            self.store.put(
                {
                    keys[reply.prompt][slot]: json.dumps(_plain(reply)).encode()
                    for slot, replies in zip(slots, replies_by_slot, strict=True)
                    for reply in replies
                }
            )

    def _kept_replies(
        self,
        prompts: tuple[Prompt, ...],
        interventions: Sequence[Edit | None],
        keys: dict[Prompt, list[str]],
        opening: str,
    ) -> list[list[Reply]]:
        replies = []
        for slot, one in enumerate(interventions):
            stored = self.store.get(keys[p][slot] for p in prompts)
            label = one.label if one else ""
            records = [json.loads(stored[keys[p][slot]]) for p in prompts]
            replies.append(
                [_reply(p, of, label, opening) for p, of in zip(prompts, records, strict=True)]
            )
        return replies

    def _state_key(self, prompt: Prompt, position: str) -> str:
        return key_of("state", self.name, _messages_of(prompt), position)

    def _thinking_keys(self, reply: Reply) -> list[str]:
        parts = ("thinking", self.name, _messages_of(reply.prompt), reply.ids)
        return [key_of(*parts, position) for position in THINKING_POSITIONS]


def _chunks(items: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    return (tuple(items[at : at + size]) for at in range(0, len(items), size))


def _each_once(keys: Mapping[Prompt, Sequence[str]]) -> list[Prompt]:
    """The first prompt with each text: what is asked once is the same in a run that goes on."""
    first: dict[tuple[str, ...], Prompt] = {}
    for prompt, of in keys.items():
        first.setdefault(tuple(of), prompt)
    return list(first.values())


def _messages_of(prompt: Prompt) -> list[Any]:
    """All of a prompt that the model, or the choice of steered tokens, depends on."""
    return [prompt.text, [asdict(turn) for turn in prompt.history], prompt.question_at]


def _digest(one: Edit | None, prompt: Prompt) -> list[Any]:
    """All of an edit that the run of a prompt depends on."""
    if one is None:
        return []
    if isinstance(one, Knockout):
        return ["knockout", list(one.blocks), one.keys, one.readers, one.draw]
    if isinstance(one, Ablation):
        return ["ablation", _sha(one.vector), one.tokens]
    if isinstance(one, Intervention):
        while_replying = ["while replying"] if one.while_replying else []
        vector = _sha(one.vector_of(prompt))
        steered = [int(one.layer), vector, float(one.coefficient), one.tokens]
        return steered + while_replying
    states = _sha(one.states[prompt]) if prompt in one.states else ""
    return ["patch", int(one.layer), list(one.positions), states]


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _sha(values: torch.Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()


def _plain(reply: Reply) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in ("text", "ids", "finished", "watched")}


def _reply(prompt: Prompt, record: dict[str, Any], label: str, opening: str) -> Reply:
    watched = tuple((word, chance) for word, chance in record["watched"])
    return Reply(
        prompt, opening + record["text"], tuple(record["ids"]), record["finished"], label, watched
    )
