"""States: residual-stream vectors at named positions; and the Backend protocol, the one seam.

Axis names in shapes: n prompts, p positions, l layers, d width, h queries.
Layer k is the residual stream after k blocks: 0 is the embedding output, the last is the output
of the last block *before* the final norm (the paper's convention).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.files import atomic_path
from latentguard.interventions import Edit
from latentguard.prompts import Message, Prompt, Reply

Progress = Callable[[int], None]
"""Called with the number of prompts just done."""


def no_progress(count: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(name: str, items: object, progress: Progress | None = None) -> Iterator[Progress]:
    """The progress that was given; without one, a bar if somebody is there to watch it.

    Args:
        name: What is being done.
        items: What it is done to; where it has a length, the bar shows the share and the time left.
        progress: Used as it is.
    """
    if progress is not None or not is_interactive():
        yield progress or no_progress
        return
    from tqdm.auto import tqdm

    total = len(items) if isinstance(items, Sized) else None
    with tqdm(desc=name, total=total, unit=" prompts") as bar:
        yield bar.update


def is_interactive() -> bool:
    """Whether a person works in a notebook or at a Python prompt, rather than in a program."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def show_numbers(numbers: Sequence[int]) -> str:
    """Numbers as people read them: ``0..28`` where none is left out, else each."""
    first = numbers[0] if numbers else 0
    if len(numbers) > 2 and tuple(numbers) == tuple(range(first, first + len(numbers))):
        return f"{first}..{numbers[-1]}"
    return ", ".join(map(str, numbers)) if len(numbers) < 2 else f"({', '.join(map(str, numbers))})"


CHANGES = {
    "weights": " (fine-tuned, merged, quantised or swapped)",
    "tokenizer": " (edited, or of another model)",
    "template": " (edited, or of another model)",
}
"""What may have happened where a digest differs."""


@dataclass(frozen=True)
class Fingerprint:
    """What a set of states, and so a guard, is bound to."""

    model: str
    """Where the model came from: Hub id, folder or file name. Informative, never compared."""

    weights: str
    """SHA-256 over name, shape and evenly spaced values of every tensor."""

    tokenizer: str
    """SHA-256 of the tokenizer."""

    template: str
    """SHA-256 of the chat template."""

    dtype: str
    """What the model computes in, such as ``bfloat16``; ``bfloat16/int8`` if it was quantised."""

    def differences(self, other: Fingerprint) -> list[str]:
        """Name what binds and differs, such as ``dtype float32 instead of bfloat16``, and why."""
        bound = [f.name for f in fields(self) if f.name != "model"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in bound]
        return [
            f"{name} {b[:12]} instead of {a[:12]}{CHANGES.get(name, '')}"
            for name, a, b in pairs
            if a != b
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of all that binds."""
        bound = json.dumps([self.weights, self.tokenizer, self.template, self.dtype])
        return hashlib.sha256(bound.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class States:
    """What a model held at some positions and layers, for some prompts.

    Examples:
        >>> states = lg.States.collect(model.capture(["Hello.", "How are you?"]))
        >>> states  # doctest: +ELLIPSIS
        States(n=2, positions=(t_inst, t_post), layers=0..4, width=32)
        >>> states.at("t_inst").shape
        torch.Size([2, 5, 32])
    """

    values: Float[Tensor, "n p l d"]
    """Residual stream, on the CPU, in the model's dtype."""

    prompts: tuple[Prompt, ...]
    """The n prompts."""

    positions: tuple[str, ...]
    """The p position names, such as ``t_inst``."""

    layers: tuple[int, ...]
    """The l layer indices."""

    fingerprint: Fingerprint
    """The model."""

    def __post_init__(self) -> None:
        expected = (len(self.prompts), len(self.positions), len(self.layers))
        if tuple(self.values.shape[:3]) != expected:
            raise ValueError(f"values are {tuple(self.values.shape)}, expected {expected} and d")

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        positions = ", ".join(self.positions)
        layers = show_numbers(self.layers)
        width = self.values.shape[-1]
        return f"States(n={len(self)}, positions=({positions}), layers={layers}, width={width})"

    def at(self, position: str) -> Float[Tensor, "n l d"]:
        """The states at one position.

        Raises:
            KeyError: if the position was not captured.
        """
        if position not in self.positions:
            raise KeyError(f"position '{position}' was not captured, only {self.positions}")
        return self.values[:, self.positions.index(position)]

    def where(self, keep: Callable[[Prompt], bool]) -> States:
        """The states of the prompts that ``keep`` accepts."""
        rows = [i for i, prompt in enumerate(self.prompts) if keep(prompt)]
        prompts = tuple(self.prompts[i] for i in rows)
        return replace(self, values=self.values[rows], prompts=prompts)

    def select(self, layers: Sequence[int]) -> States:
        """The states at some of the captured layers.

        Raises:
            KeyError: if a layer was not captured.
        """
        if tuple(layers) == self.layers:
            return self
        if missing := set(layers) - set(self.layers):
            raise KeyError(f"layers {sorted(missing)} were not captured")
        slots = [self.layers.index(layer) for layer in layers]
        return replace(self, values=self.values[:, :, slots], layers=tuple(layers))

    @staticmethod
    def collect(batches: Iterable[States]) -> States:
        """Put batches together, in order.

        Raises:
            GuardError: if there is no batch.
        """
        parts = list(batches)
        if not parts:
            raise GuardError("There are no states: expected at least one prompt, found none.")
        values = torch.cat([part.values for part in parts])
        return replace(parts[0], values=values, prompts=sum((p.prompts for p in parts), ()))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (prompts and fingerprint in its metadata)."""
        rows = [
            {k: v for k, v in asdict(p).items() if v not in (None, "", ())} for p in self.prompts
        ]
        meta = dict(prompts=rows, positions=self.positions, layers=self.layers)
        header = {"states": json.dumps(meta | {"fingerprint": asdict(self.fingerprint)})}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file({"values": self.values.contiguous()}, partial, metadata=header)

    @staticmethod
    def load(path: str | Path) -> States:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as file:
            meta, values = json.loads(file.metadata()["states"]), file.get_tensor("values")
        return States(
            values,
            tuple(_prompt(row) for row in meta["prompts"]),
            tuple(meta["positions"]),
            tuple(meta["layers"]),
            Fingerprint(**meta["fingerprint"]),
        )


def _prompt(row: dict[str, Any]) -> Prompt:
    history = tuple(Message(**turn) for turn in row.pop("history", ()))
    return Prompt(**row, history=history)


class Backend(Protocol):
    """What experiments and guards need of a model; transformers and vLLM each implement it."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What a guard of this model is bound to."""

    @property
    def depth(self) -> int:
        """Number of blocks L; layers run from 0 to L."""

    @property
    def post(self) -> int:
        """Number of post-instruction tokens; t_post is post+this."""

    def capture(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        layers: Sequence[int] | None = None,
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield the states of the prompts, in order, in batches; all layers if None.

        ``queries`` are those of positions such as ``attended+1``.
        """


@runtime_checkable
class Scoring(Protocol):
    """A backend that lets no states out but scores texts for a guard itself, such as vLLM."""

    def scores(self, guard: Any, texts: Iterable[Prompt]) -> Iterator[Any]:
        """Yield the guard's ``VariantScore`` of each text, in order."""


@runtime_checkable
class ReplyScoring(Protocol):
    """A backend that lets no states out but scores the tokens of replies itself, such as vLLM."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model."""

    def reply_scores(
        self, replies: Iterable[Reply], layers: Sequence[int], weight: Float[Tensor, "l d"]
    ) -> Iterator[tuple[Reply, Float[Tensor, "t"]]]:
        """Yield each reply, in order, with what its tokens score."""


class Speaker(Backend, Protocol):
    """A backend that also replies; what the study needs of a model."""

    @property
    def width(self) -> int:
        """Width d of the residual stream."""

    def sweep(
        self,
        prompts: Iterable[Prompt],
        interventions: Iterable[Edit | None],
        *,
        max_new_tokens: int = 24,
        post: bool = True,
        watch: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """Reply to prompts greedily under each intervention, a list for each.

        ``post`` keeps the post-instruction tokens; of the words in ``watch`` each reply carries the
        log-probability as first word.
        """

    def reply_losses(self, replies: Sequence[Reply]) -> list[float]:
        """Mean loss of each reply's tokens behind its prompt, unsteered, in nats a token."""

    def capture_thinking(self, replies: Sequence[Reply]) -> list[Float[Tensor, "2 l d"] | None]:
        """States at the last token of each reply's thinking, and at the first behind it.

        None of a reply that has no thinking, or nothing behind it.
        """

    def capture_replies(self, replies: Sequence[Reply]) -> list[Float[Tensor, "t l d"]]:
        """States at all layers at t_post, then at each token of each reply but its end."""


def digest_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over what was said and how it was labelled, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        turns = [[m.role, m.content] for m in prompt.history]
        digest.update(json.dumps([prompt.text, prompt.harmful, turns]).encode())
    return digest.hexdigest()


ATTENDED = "attended+"
"""With the number of a query behind it, from 1 on, the name of the position where it looks."""


@dataclass(frozen=True, eq=False)
class TokenQueries:
    """Fitted queries: a token weighs the more in a mean, the more its state is like a query.

    The state at the position ``attended+k`` of a layer is the mean of the states of the
    instruction's tokens there, with the weights of query k: the softmax, over these tokens, of
    states times the query.
    """

    layer: int
    """Of the states that queries are compared with; the weights hold for it and all above."""

    vectors: Float[Tensor, "h d"]
    """Float32."""

    @property
    def positions(self) -> tuple[str, ...]:
        """The name of each query's position."""
        return tuple(f"{ATTENDED}{k + 1}" for k in range(len(self.vectors)))

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        return {"layer": self.layer}, {"vectors": self.vectors}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TokenQueries:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        vectors = tensors["vectors"]
        if vectors.ndim != 2 or not len(vectors) or not torch.isfinite(vectors).all():
            raise ValueError("the queries are not finite numbers, a row for each")
        return TokenQueries(int(record["layer"]), vectors)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        content = self.vectors.contiguous().numpy().tobytes()
        return hashlib.sha256(f"{self.layer}:".encode() + content).hexdigest()


@dataclass(frozen=True, eq=False)
class AttendedSlots:
    """Which of the positions of a capture are attended, and by which queries."""

    slots: tuple[int, ...]
    """Numbers of the positions."""

    vectors: Float[Tensor, "a d"]
    """A query for each of them."""


def attended_slots(
    positions: Sequence[str], layers: Sequence[int], queries: TokenQueries | None
) -> AttendedSlots | None:
    """The attended ones of some positions; None if there are none.

    Raises:
        GuardError: if there is no such query, or its layer is not the lowest of ``layers``.
    """
    slots = tuple(n for n, position in enumerate(positions) if position.startswith(ATTENDED))
    if not slots:
        return None
    if queries is None:
        raise GuardError(
            f"The position '{positions[slots[0]]}' is where a guard's query looks; found no "
            "queries. Capture it with the guard's own: queries=guard.reading.queries."
        )
    names = queries.positions
    if unknown := [positions[slot] for slot in slots if positions[slot] not in names]:
        raise GuardError(
            f"There is no position '{unknown[0]}': expected one of {', '.join(names)}."
        )
    if min(layers) != queries.layer:
        raise GuardError(
            f"Queries look at layer {queries.layer}, so it has to be the lowest that is read; "
            f"found layer {min(layers)}."
        )
    wanted = [names.index(positions[slot]) for slot in slots]
    return AttendedSlots(slots, queries.vectors[torch.tensor(wanted)])


READING_NAMES = "t_inst, t_post, post+1, post+2, ..., sealed, span, pooled or attended"
DEFAULT_READING = "pooled"

POOLED = ("t_inst", "post", "t_post", "mean")
"""Positions of the reading ``pooled``, and the first ones of ``attended``."""

MEAN_POSITIONS = ("mean", "post")
"""Positions that are means over tokens."""


@dataclass(frozen=True)
class Reading:
    """Where a guard reads."""

    name: str
    """One of ``READING_NAMES``."""

    positions: tuple[str, ...]
    """The positions to capture."""

    queries: TokenQueries | None = None
    """The queries of its attended positions; None if it has none, or they are not fitted yet."""

    @staticmethod
    def of(name: str, post: int) -> Reading:
        """The reading of that name on a template with ``post`` post-instruction tokens.

        ``attended`` is ``pooled`` until its queries are fitted (``with_queries``).

        Raises:
            GuardError: if there is no such reading.
        """
        positions: dict[str, tuple[str, ...]] = {
            "t_inst": ("t_inst",),
            "t_post": ("t_post",),
            "sealed": ("t_inst",),
            "span": ("t_inst", *(f"post+{k}" for k in range(1, post)), "t_post"),
            "pooled": POOLED,
            "attended": POOLED,
            **{f"post+{k}": (f"post+{k}",) for k in range(1, post + 1)},
        }
        if name not in positions:
            raise GuardError(
                f"There is no reading '{name}' here: expected {READING_NAMES}, with k up to {post}."
            )
        return Reading(name, positions[name])

    def with_queries(self, queries: TokenQueries) -> Reading:
        """The same with the positions where queries look."""
        return replace(self, positions=(*self.positions, *queries.positions), queries=queries)

    def prepare(self, prompt: Prompt) -> Prompt:
        """The prompt as it is read: its ending made uniform if the reading is sealed."""
        return replace(prompt, text=seal(prompt.text)) if self.name == "sealed" else prompt


def require_reading_name(name: str) -> None:
    """Raise a GuardError if no template has a reading of that name."""
    post = re.fullmatch(r"post\+(\d+)", name)
    Reading.of(name, int(post[1]) if post and int(post[1]) < 1000 else 1)


def seal(text: str) -> str:
    """Replace closing white space and ``. ? !`` by one full stop."""
    return re.sub(r"(?<![\s.?!])[\s.?!]+$", "", text) + "."  # looks at each run of blanks once
