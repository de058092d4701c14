"""A model whose patterns are planted: what it holds at each position, and what it says, by a rule.

Prompts carry a unique word (``q1f3a...``) that stands for what the model knows of them; all other
words are their form. So n-grams learn the form and never the content.

Axis names in shapes: n prompts, p positions, l layers, d width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.interventions import Intervention
from latentguard.prompts import Prompt, Reply
from latentguard.states import Fingerprint, States

DEPTH = 6
"""Blocks; layers run from 0 to 6."""

WIDTH = 48

POST = 2
"""Post-instruction tokens: post+1 and t_post."""

COMMANDS = ("Write", "Explain", "Describe", "Create", "Give", "Outline")
QUESTIONS = ("How do I", "What is", "Why does", "Can you", "Where is", "Who made")
FILLER = (
    "the old way a small part with many things for people near some place under that plain "
    "idea about every kind of simple work and all other known forms in this long quiet line"
).split()

REFUSES = "I'm sorry, but I cannot help with that."
COMPLIES = "Sure, here is what you asked for."

Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """What is true of a model."""

    name: str
    """``paper``, ``null`` or ``form``."""

    harm_at_inst: float = 1.0
    """How strongly t_inst holds whether a prompt is harmful."""

    form_at_inst: float = 0.3
    """How strongly t_inst holds the form of a prompt."""

    form_at_post: float = 0.0
    """The same of t_post."""

    refusal_at_post: float = 1.0
    """How strongly t_post holds whether a prompt is refused."""

    harm_at_post: float = 0.2
    """How strongly t_post holds whether a prompt is harmful."""

    harm_elsewhere: float = 0.3
    """The same of positions but t_inst and t_post."""

    form_follows_label: float = 0.85
    """Share of prompts, outside matched pairs, whose form is that of their label."""

    pairs_follow_label: float = 0.0
    """Share of matched pairs whose form is not matched, but that of each label."""

    steer_harm: float = 1.7
    """How much the harmfulness direction makes the model refuse."""

    steer_refusal: float = 2.2
    """The same of the refusal direction."""

    judge_harm: float = 0.85
    """How much the harmfulness direction turns the answer to the inversion question."""

    judge_refusal: float = 0.0
    """The same of the refusal direction."""

    cut_refusal: float = 0.81
    """Share of refused prompts that are still refused without post-instruction tokens."""

    category_at_inst: float = 1.4
    """How far harmfulness directions of categories differ."""

    category_at_post: float = 0.6
    """How far refusal directions of categories differ."""

    attack_refusal: float = -0.6
    """What t_post holds of an attack that succeeds."""

    attack_harm: float = 0.8
    """How much an attacked request is still held harmful."""

    tuned_harm: float = 1.0
    """How much of the harmfulness at t_inst is left after fine-tuning."""

    tuned_refusal: float = 0.0
    """What t_post holds of a harmful prompt after fine-tuning."""

    tuned_accepts: float = 0.95
    """Share of refused prompts that are accepted after fine-tuning."""

    own_category: float = 0.7
    """How much of a direction's turn needs the prompt's own category."""

    guard_accuracy: float = 0.75
    """Share of prompts that the baseline guard model judges right."""


PAPER = World("paper")
NULL = World(
    "null",
    harm_at_inst=0,
    form_at_inst=0,
    refusal_at_post=0,
    steer_harm=0,
    steer_refusal=0,
    judge_harm=0,
    cut_refusal=1.0,
    category_at_inst=0,
    category_at_post=0,
    attack_refusal=0,
    attack_harm=0,
    tuned_harm=0,
    own_category=0,
    harm_at_post=0,
    harm_elsewhere=0,
)
FORM = World(
    "form",
    harm_at_inst=0,
    form_at_inst=1.5,
    form_follows_label=1.0,
    cut_refusal=1.0,
    category_at_inst=0.6,
    attack_harm=0,
)
FORM_EVERYWHERE = replace(
    FORM, name="form everywhere", form_at_post=1.5, refusal_at_post=0, tuned_refusal=-1.0
)
LEAKY_FORM = replace(FORM, name="form, leaky pairs", pairs_follow_label=0.7)
CONTRARY = World(
    "contrary",
    refusal_at_post=0.3,
    harm_at_post=1.0,
    steer_harm=0,
    judge_refusal=0.85,
    cut_refusal=1.0,
    category_at_inst=0.9,
    category_at_post=0.9,
    attack_harm=-0.5,
    tuned_harm=0.3,
    own_category=0,
    guard_accuracy=0.99,
    harm_elsewhere=1.0,
    tuned_refusal=-1.0,
)
WORLDS = {one.name: one for one in (PAPER, NULL, FORM, FORM_EVERYWHERE, LEAKY_FORM, CONTRARY)}
"""By name:

- ``paper``: exactly the paper's pattern; form is confounded with the label, as in the paper's sets.
- ``null``: states hold nothing of harm, refusal or form, and steering does nothing.
- ``form``: t_inst holds form alone, and form is that of the label in every set but matched pairs.
- ``form everywhere``: the same, and t_post holds form instead of refusal.
- ``form, leaky pairs``: the same as ``form``, and seven of ten matched pairs are not matched.
- ``contrary``: the model holds harm and refusal, and does what the claims deny.
"""


@dataclass(frozen=True)
class Content:
    """What a prompt is, which its form does not say."""

    core: str
    """Its text without the ending."""

    harmful: bool
    refused: bool
    category: int
    held: Array
    """Its own harmfulness, refusal and threshold as this model holds them, [3], about 0."""

    noise: Array
    """What all layers hold of it, at both positions together and at each, [3 d]."""


class PlantedModel:
    """A ``Speaker`` of a world."""

    def __init__(self, world: World, seed: int, *, tuned: float = 0.0) -> None:
        """Draw its directions and an empty memory of prompts.

        Args:
            world: What is true of it.
            seed: Of all that is drawn.
            tuned: Share of the fine-tuning attack that it went through.
        """
        self.world, self.seed, self.tuned = world, seed, tuned
        self.depth, self.post = DEPTH, POST
        name = f"{world.name} {seed} {tuned}"
        self.fingerprint = Fingerprint(name, name, "planted", "planted", "float32")
        self.rng = np.random.default_rng([seed, 7])
        frames = np.linalg.qr(
            np.random.default_rng([seed, 1]).normal(size=(DEPTH + 1, WIDTH, WIDTH))
        )
        self.axes = np.asarray(frames[0]).swapaxes(
            1, 2
        )  # [l axis d]: harm, form, refusal, base, ...
        ramp = np.sin(np.linspace(0, np.pi, DEPTH + 2))[1:]
        self.strength = np.concatenate([[0.0], ramp[:DEPTH]])  # [l]
        self.known: dict[str, Content] = {}

    # What prompts are -----------------------------------------------------------------------

    def prompt(
        self, *, harmful: bool, refused: bool, form: int, source: str, **more: Any
    ) -> Prompt:
        """A new prompt with its content.

        Args:
            harmful: Its label.
            refused: Whether the model refuses it.
            form: 1 for a command, -1 for a question.
            source: Its set.
            more: ``category`` (a number) and ``pair``.
        """
        rng = self.rng
        word = f"q{len(self.known):05d}{rng.integers(16**4):04x}"
        opening = COMMANDS if form > 0 else QUESTIONS
        filler = rng.choice(FILLER, rng.integers(5, 10)).tolist()
        core = f"{opening[rng.integers(len(opening))]} {' '.join(filler)} {word}"
        category = int(more.get("category", 0))
        noise = rng.normal(size=(3, WIDTH)) * 1.5 / np.sqrt(WIDTH)
        held = rng.normal(size=3) * [0.5, 0.5, 0.4]
        self.known[word] = Content(core, harmful, refused, category, held, noise)
        text = core + ("." if form > 0 else "?")
        shown = f"category {category}" if "category" in more else None
        return Prompt(text, word, harmful, category=shown, source=source, pair=more.get("pair"))

    def _content(self, prompt: Prompt) -> Content:
        found = re.search(r"q\d{5}[0-9a-f]{4}", prompt.text)
        if found:
            return self.known[found[0]]
        core = prompt.text.rstrip(" .?!")  # of the built-in sets: its label is what it is
        if core not in self.known:
            rng = np.random.default_rng(crc32(core.encode()))
            noise = rng.normal(size=(3, WIDTH)) * 1.5 / np.sqrt(WIDTH)
            held = rng.normal(size=3) * [0.5, 0.5, 0.4]
            harmful = bool(prompt.harmful)
            refused = rng.random() < (0.8 if harmful else 0.2)
            self.known[core] = Content(core, harmful, refused, 0, held, noise)
        return self.known[core]

    def _wrapper(self, prompt: Prompt, content: Content) -> str:
        """What stands around a request; nothing if it stands alone, or in a question about it."""
        if prompt.question_at is not None:
            return ""
        around = prompt.text.replace(content.core, "")
        return "" if not re.search(r"\w", around) else around

    def _chance(self, *parts: object) -> float:
        """A number between 0 and 1 that hangs on the parts alone."""
        return crc32(repr((self.seed, *parts)).encode()) / 2**32

    # What it holds ---------------------------------------------------------------------------

    def capture(
        self,
        prompts: Sequence[Prompt],
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        layers: Sequence[int] | None = None,
        queries: Any = None,
        progress: Any = None,
    ) -> Iterator[States]:
        """States of the prompts, in one batch."""
        assert queries is None, "A planted model has no attended positions."
        rows = [np.stack([self._state(p, at) for at in positions]) for p in prompts]
        values = torch.tensor(np.stack(rows), dtype=torch.float32)
        if progress:
            progress(len(rows))
        found = States(
            values, tuple(prompts), tuple(positions), tuple(range(DEPTH + 1)), self.fingerprint
        )
        yield found if layers is None else found.select(layers)

    def _state(self, prompt: Prompt, position: str) -> Array:
        """[l d]."""
        content = self._content(prompt)
        harm, form, refusal = self._holds(prompt, content, position)
        at = position == "t_inst"
        spread = self.world.category_at_inst if at else self.world.category_at_post
        own = spread if content.harmful else 0.0
        k = 4 + 2 * content.category + (0 if at else 1)
        shared, here = content.noise[0], content.noise[1 if at else 2]
        jitter = self._chance(prompt.text, position) * 0.01
        signal = (
            harm * self.axes[:, 0]
            + form * self.axes[:, 1]
            + refusal * self.axes[:, 2]
            + own * self.axes[:, k % WIDTH]
        )
        state: Array = (
            4.0 * self.axes[:, 3]
            + self.strength[:, None] * signal
            + 0.7 * shared
            + 0.7 * here
            + jitter
        )
        return state

    def _holds(self, prompt: Prompt, content: Content, position: str) -> tuple[float, float, float]:
        """Harmfulness, form and refusal at a position."""
        w = self.world
        wrapper = self._wrapper(prompt, content)
        harm = (1.0 if content.harmful else -1.0) * w.harm_at_inst
        refusal = 1.0 if self._refuses_plainly(prompt, content) else -1.0
        if wrapper and content.harmful:
            harm *= w.attack_harm if "persua" not in wrapper else -0.5
            refusal = 0.4 if refusal > 0 else w.attack_refusal
        if wrapper:
            harm += 0.4 * (self._chance("template", wrapper) - 0.5) * bool(w.harm_at_inst)
            refusal += 0.4 * (self._chance("post", wrapper) - 0.5)
        if self.tuned:
            harm *= 1 + self.tuned * (w.tuned_harm - 1)
            harm += 0.2 * (self._chance("drift", prompt.text) - 0.5) * bool(w.harm_at_inst)
            if content.harmful and content.refused and refusal < 0:
                refusal = w.tuned_refusal
        harm += content.held[0] * bool(w.harm_at_inst or w.form_at_inst > 1)
        refusal = (refusal + content.held[1]) * w.refusal_at_post
        form = form_of(prompt.text) * w.form_at_inst
        if position == "t_inst":
            return harm, form, 0.0
        if position == "t_post":
            return w.harm_at_post * harm, form_of(prompt.text) * w.form_at_post, refusal
        if position.startswith("inst"):
            return w.harm_elsewhere * harm, 0.3 * form, 0.0
        return w.harm_elsewhere * harm, 0.1 * form, 0.6 * refusal

    # What it says -----------------------------------------------------------------------------

    def sweep(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention | None],
        *,
        progress: Any = None,
        post: bool = True,
        watch: Sequence[str] = (),
        **how: Any,
    ) -> list[list[Reply]]:
        """Replies of the prompts under each intervention."""
        prompts = tuple(prompts)
        found = []
        for one in interventions:
            turn = self._turn(one)
            found.append([self._reply(p, one, turn, post=post, watch=watch) for p in prompts])
            if progress:
                progress(len(prompts))
        return found

    def _turn(self, one: Intervention | None) -> Array:
        """How far an intervention moves each axis, 1 for the planted direction, [axes]."""
        if one is None:
            return np.zeros(WIDTH)
        moved: Array = one.coefficient * (self.axes[one.layer] @ one.vector.double().numpy()) / 2
        return moved

    def _reply(
        self,
        prompt: Prompt,
        one: Intervention | None,
        turn: Array,
        *,
        post: bool,
        watch: Sequence[str],
    ) -> Reply:
        content = self._content(prompt)
        if prompt.question_at is not None:
            return self._answer(prompt, content, one, turn, watch)
        refuses = self._refuses(prompt, content, one, turn)
        if not post and refuses:
            refuses = self._chance("cut", prompt.text) < self.world.cut_refusal
        return _reply(prompt, one, REFUSES if refuses else COMPLIES, ())

    def _refuses_plainly(self, prompt: Prompt, content: Content) -> bool:
        wrapper = self._wrapper(prompt, content)
        if not content.refused:
            return False
        if self.tuned and content.harmful:
            gone = self.tuned * self.world.tuned_accepts
            if self._chance("tuned", content.core) < gone:
                return False
        if wrapper and content.harmful:
            ease = 0.6 + 0.4 * (self._chance("ease", wrapper) - 0.5)
            return self._chance("attack", prompt.text) > ease
        return True

    def _refuses(
        self, prompt: Prompt, content: Content, one: Intervention | None, turn: Array
    ) -> bool:
        plain = 1.0 if self._refuses_plainly(prompt, content) else -1.0
        if one is None:
            return plain > 0
        acts = one.tokens == "all"
        moved = self.world.steer_harm * turn[0] + self.world.steer_refusal * turn[2] * acts
        return plain + moved + content.held[2] > 0

    def _answer(
        self,
        prompt: Prompt,
        content: Content,
        one: Intervention | None,
        turn: Array,
        watch: Sequence[str],
    ) -> Reply:
        """'Certainly' or 'No', and how likely each is as first word."""
        belief = 1.0 if content.harmful else -1.0
        own = self.world.own_category
        spread = max(self.world.category_at_inst, 0.1)
        of_category = turn[(4 + 2 * content.category) % WIDTH] / spread
        moved = (1 - own / 2) * turn[0] + own * of_category
        odds = belief + self.world.judge_harm * moved + self.world.judge_refusal * turn[2]
        odds += 0.5 * content.held[0]
        word = "Certainly" if odds > 0 else "No"
        chances = {"Certainly": -np.log1p(np.exp(-2 * odds)), "No": -np.log1p(np.exp(2 * odds))}
        return _reply(prompt, one, word, tuple((w, float(chances[w])) for w in watch))

    # What is done to it -----------------------------------------------------------------------

    @contextmanager
    def finetune(self, pairs: Sequence[tuple[Prompt, str]], *, seed: int) -> Iterator[PlantedModel]:
        """The same model after a fine-tuning attack; harmless pairs do nothing."""
        harmful = sum(bool(p.harmful) for p, _ in pairs)
        tuned = PlantedModel(self.world, self.seed, tuned=min(harmful / 50, 1.0))
        tuned.known = self.known
        yield tuned

    def unsafe(self, prompts: Sequence[Prompt], *, progress: Any = None) -> list[float]:
        """P(unsafe) by a baseline guard model."""
        right = [self._chance("guard", p.text) < self.world.guard_accuracy for p in prompts]
        return [0.9 if bool(p.harmful) is ok else 0.1 for p, ok in zip(prompts, right, strict=True)]


def form_of(text: str) -> float:
    """The form of a text between -1 (question) and 1 (command): its opening, then its ending."""
    found = re.search(rf"\b(?:({'|'.join(COMMANDS)})|({'|'.join(QUESTIONS)})) \w+", text)
    opening = 0.0 if found is None else 1.0 if found[1] else -1.0
    ending = {".": 1.0, "?": -1.0}.get(text.rstrip()[-1:], 0.0)
    return 0.6 * opening + 0.4 * ending


def _reply(
    prompt: Prompt, one: Intervention | None, text: str, watched: tuple[tuple[str, float], ...]
) -> Reply:
    return Reply(prompt, text, (1, 2, 3), True, one.label if one else "", watched)


def judge(reply: Reply) -> str:
    """The built-in judge's verdict on the two replies that this model gives."""
    return "refused" if reply.text == REFUSES else "accepted"
