"""A backend whose prompts have kinds, and labelled prompts of these kinds."""

from dataclasses import replace

from fake_backend import FakeBackend, labelled, planted, texts
from latentguard.prompts import Prompt

KINDS = ("arson", "fraud", "spite")


class Kinds(FakeBackend):
    """Words of a kind move the states along a direction of their own, at every position."""

    def _state(self, prompt, index):
        state = super()._state(prompt, index)
        for kind in (*KINDS, "novel"):
            if kind in prompt.text:
                along = planted(kind, self.depth, self.width)
                overlap = (along * self.harm).sum(-1, keepdim=True)
                state = state + 5 * (along - overlap * self.harm)
        return state


def kinds(count, start=0):
    """Pairs whose harmful members are of one kind, in turn."""
    return [
        replace(p, text=f"{p.text} {kind}", category=kind) if p.harmful else p
        for n in range(start, start + count)
        for p in labelled(1, start=n)
        for kind in [KINDS[n % len(KINDS)]]
    ]


def harmless(count, start=5000, word="item"):
    return [Prompt(t, harmful=False) for t in texts(count, bad=False, start=start, name=word)]


def novel(count, start=0):
    """Harmful prompts that the guard's own direction does not know: no "bad" in them."""
    said = texts(count, bad=False, start=start, name="novel")
    return [Prompt(text, harmful=True) for text in said]


def kinds_of(kind, count):
    """Harmful prompts of one kind."""
    return [p for p in kinds(3 * count, start=7000) if p.category == kind]
