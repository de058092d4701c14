"""Models that note what they are asked, and prompts to ask them; for tests of CachedModel."""

from dataclasses import replace
from math import prod
from random import Random

import torch

from latentguard.interventions import Intervention
from latentguard.prompts import Prompt, Reply
from latentguard.states import Fingerprint, States
from latentguard.study.cached_model import CachedModel

SHORT = dict(max_new_tokens=2)


class Spy:
    """A model that notes what it is asked, and dies after some calls."""

    def __init__(self, model, dies_after=None):
        self.model, self.left = model, dies_after
        self.texts, self.calls, self.before = [], 0, lambda: None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def capture(self, prompts, **how):
        self._note(prompts)
        return self.model.capture(prompts, **how)

    def sweep(self, prompts, interventions, **how):
        self._note(prompts)
        return self.model.sweep(prompts, interventions, **how)

    def _note(self, prompts):
        self.before()
        if self.left == self.calls:
            raise SystemExit(137)
        self.calls += 1
        self.texts += [p.text for p in prompts]


def prompts(count, start=0):
    """Of many lengths, so that batches matter; every fourth text comes again under a label."""
    made = [
        Prompt("word " * (1 + 3 * n % 7) + str(n), id=str(n)) for n in range(start, start + count)
    ]
    again = [replace(p, id=f"{p.id} again", harmful=True) for p in made[::4]]
    mixed = [*made, *again]
    return sorted(mixed, key=lambda p: hash_of(p.id))


def hash_of(text):
    return sum(ord(c) * 31**n for n, c in enumerate(text)) % 101


def steering(model, count=3):
    noise = torch.Generator().manual_seed(1)
    return [
        None,
        *(
            Intervention(n % 4, torch.randn(model.width, generator=noise), 2.0, "all", f"way {n}")
            for n in range(count - 1)
        ),
    ]


def said(replies):
    """All that a reply says but whose it is."""
    return [[(r.text, r.ids, r.finished, r.watched) for r in one] for one in replies]


def killed(model, store, ask, after):
    """Ask a cached_model whose model dies after some calls; whether it did."""
    try:
        ask(CachedModel(Spy(model, after), store))
    except SystemExit:
        return True
    return False


class Rounding:
    """A model all of whose numbers depend on the batch, as the last bits do on a GPU."""

    depth, post, width = 3, 2, 4
    fingerprint = Fingerprint("fake", "w", "t", "c", "float32")

    def capture(self, prompts, *, positions, progress):
        drawn = Random(repr((prompts, positions)))
        shape = (len(prompts), len(positions), self.depth + 1, self.width)
        values = torch.tensor([drawn.random() for _ in range(prod(shape))]).view(shape)
        layers = tuple(range(self.depth + 1))
        yield States(values, tuple(prompts), tuple(positions), layers, self.fingerprint)

    def sweep(self, prompts, interventions, *, progress, **how):
        drawn = Random(repr((prompts, [i and i.label for i in interventions], how)))
        return [
            [Reply(p, "", (), True, "", (("No", drawn.random()),)) for p in prompts]
            for _ in interventions
        ]
