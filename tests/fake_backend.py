"""A backend without a model: states drawn around planted directions, fixed by what is said."""

import hashlib
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from latentguard.prompts import Prompt
from latentguard.states import Fingerprint, States

FINGERPRINT = Fingerprint(
    "fake", weights="a" * 64, tokenizer="b" * 64, template="c" * 64, dtype="float32"
)


class FakeBackend:
    """Implements ``Backend``.

    A text that holds the word "bad" is harmful, one that holds "no" is refused. The first moves the
    states along ``harm`` at t_inst and after, the second along ``refusal`` at t_post.
    """

    def __init__(
        self,
        *,
        depth=6,
        post=2,
        width=16,
        signal=3.0,
        batch=7,
        salt="",
        shift=0.0,
        dtype=torch.float32,
        fingerprint=FINGERPRINT,
    ):
        self.depth, self.post, self.width = depth, post, width
        self.fingerprint = fingerprint
        self.captured = []
        """The texts read so far."""

        self.harm = planted("harm", depth, width)
        self.refusal = planted("refusal", depth, width)
        self._offset = 2 * planted("offset", depth, width)
        self._signal, self._batch, self._salt = signal, batch, salt
        self._shift, self._dtype = shift, dtype
        self._drawn = {}

    def capture(
        self,
        prompts,
        *,
        positions=("t_inst", "t_post"),
        layers=None,
        queries=None,
        progress=None,
    ):
        layers = tuple(range(self.depth + 1) if layers is None else layers)
        rest = iter(prompts)
        while batch := tuple(islice(rest, self._batch)):
            self.captured += [prompt.text for prompt in batch]
            values = torch.stack([self._states(prompt, tuple(positions)) for prompt in batch])
            values = values[:, :, list(layers)].to(self._dtype)
            yield States(values, batch, tuple(positions), layers, self.fingerprint)
            if progress is not None:
                progress(len(batch))

    def _states(self, prompt, positions):
        key = (prompt.text, *((m.role, m.content) for m in prompt.history)), positions
        if key not in self._drawn:  # calibration reads the same prompts again and again
            states = [self._state(prompt, self._index(position)) for position in positions]
            self._drawn[key] = torch.stack(states)
        return self._drawn[key]

    def _index(self, position):
        named = {"t_inst": 0, "t_post": self.post, "mean": -1, "post": -2}
        return named[position] if position in named else int(position.removeprefix("post+"))

    def _state(self, prompt, index):
        words = prompt.text.lower().strip(".").split()
        said = "\0".join([*(m.content for m in prompt.history), prompt.text])
        state = self._offset + noise(f"{self._salt}{said}\0{index}", self.depth + 1, self.width)
        state = state + self._signal * (1 if "bad" in words else -1) * self.harm
        if index == self.post:
            state = state + 2 * self._signal * (1 if "no" in words else -1) * self.refusal
        return state + self._shift


def planted(name, depth, width):
    """A unit vector for each layer, float32 [l d]; layer 0 carries no signal."""
    vectors = noise(name, depth + 1, width)
    vectors[0] = 0
    return torch.nn.functional.normalize(vectors, dim=-1)


def noise(key, *shape):
    """Numbers of mean 0 and variance 1 that depend on nothing but the key."""
    count = int(np.prod(shape))
    words = np.frombuffer(hashlib.shake_256(key.encode()).digest(4 * count), dtype="<u4")
    uniform = words / 2**32 - 0.5
    return torch.tensor(uniform * 12**0.5, dtype=torch.float32).reshape(shape)


def texts(count, *, bad, start=0, name="item"):
    """Texts of one kind."""
    word = "bad" if bad else "good"
    return [f"Please do the {word} {name} number {n}" for n in range(start, start + count)]


def labelled(count, *, start=0, name="item"):
    """``count`` pairs of a harmful and a harmless prompt, one after the other."""
    return [
        Prompt(text, id=f"{name}-{start + n}-{bad}", harmful=bad, pair=f"{name}-{start + n}")
        for n in range(count)
        for bad in (True, False)
        for text in texts(1, bad=bad, start=start + n, name=name)
    ]


def with_refusals(prompts):
    """Every harmful prompt refused, every harmless one accepted, in text and in label."""
    return [
        Prompt(
            p.text + (" no" if p.harmful else " yes"),
            id=p.id,
            harmful=p.harmful,
            refused=p.harmful,
            pair=p.pair,
        )
        for p in prompts
    ]


def bare(guard):
    """The guard's probe and axes alone."""
    none = dict.fromkeys(("chunking", "thresholds", "quadrants", "categories"))
    return replace(guard, deobfuscate=False, **none)
