"""Tiny Llamas whose weights are set by hand: what moves the belief of harm along a reply is known.

They are the ``t_inst`` world of ``reading_worlds``, and reply in given tokens. A reply that
complies is made of ``S``; ``X`` stands for a harmful word in it.
"""

import torch

from latentguard.prompts import Reply
from models.reading_worlds import AT_STOP, STOP, WIDTH, _id, _read, reading_world

SPOKEN = 8
"""Which number says that a token is ``S``."""

NOISE = slice(16, WIDTH)
"""Numbers that mean nothing and differ by token."""

WORLDS = ("prompt", "words", "form", "stays")
"""What raises the belief: each ``S`` looks back at the harm of the prompt; harmful words of the
reply alone; each ``S`` by itself, also where it answers a harmless prompt; nothing."""


class Speaking:
    """A model that replies as a rule says: prompt -> letters, one a token."""

    def __init__(self, model, rule):
        self.model, self.rule = model, rule

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sweep(self, prompts, interventions, *, progress=None, watch=(), **how):
        return [[self._reply(p) for p in prompts] for _ in interventions]

    def _reply(self, prompt):
        text = self.rule(prompt)
        ids = tuple(_id(self.model.tokenizer, letter) for letter in text)
        return Reply(prompt, text, ids, False)


def reply_world(raised_by, tokenizer):
    """A model that refuses what is marked as refused, and complies with all else."""
    model = reading_world("t_inst", tokenizer)
    network = model.model
    with torch.no_grad():
        table = network.model.embed_tokens.weight
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(5))
        table[:, NOISE] = 0.2 * noise[:, NOISE]
        table[_id(tokenizer, "S"), SPOKEN] = 1.0
        if raised_by == "prompt":
            _read(network.model.layers[1].self_attn, SPOKEN, STOP, AT_STOP, AT_STOP)
        if raised_by == "words":
            table[_id(tokenizer, "X"), AT_STOP] = 2.0
        if raised_by == "form":
            table[_id(tokenizer, "S"), AT_STOP] = 2.0

    def rule(prompt):
        if prompt.refused:
            return "I" * (4 + len(prompt.text) % 3)
        word = "X" if prompt.harmful else "S"
        return "S" + word * (3 + len(prompt.text) % 3)

    return Speaking(model, rule)
