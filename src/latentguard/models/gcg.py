"""GCG suffixes (Zou et al., 2023) through ``nanogcg``: the adversarial suffixes of section 4.

nanogcg 0.2.3 is worked round in four places (0.3 is the same code, and forbids transformers 5).

* It cuts its prefix cache in a way that transformers 5 no longer allows: no prefix cache.
* It lets the template's control tokens into a suffix. As text they mean nothing here (see
  ``chat``), so they, and rows of the embedding that no token has, are forbidden.
* It drops candidates that do not survive decoding and encoding; with tokenizers that put a blank
  in front of every text none does. Then the search goes without this filter.
* It collects garbage after every batch, shows its own progress bar and warns of CPUs: not here.

It also encodes the text before, in and after the suffix apart, so the tokens at the seams may
differ from those of the whole text. What counts is the text: the attacked prompt is asked and read
like any other, and whether the attack succeeds is seen there.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from latentguard.errors import require_extra
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

START = "x x x x x x x x x x x x x x x x x x x x"
"""What a search begins with."""

SLOT = "{optim_str}"


class SuffixSearch:
    """Searches suffixes for one model; implements ``cached_model.Suffix``."""

    def __init__(self, model: ChatModel, *, width: int = 128, topk: int = 128) -> None:
        """Prepare searches.

        Args:
            model: A local model, with gradients.
            width: Candidates in each step.
            topk: Tokens that each place of the suffix chooses from in a step.

        Raises:
            MissingExtra: if nanogcg is not installed.
        """
        self.model, self.width, self.topk = model, width, topk
        self._gcg = require_extra("nanogcg.gcg", "attacks", "Searching GCG suffixes")

    def __call__(self, prompt: Prompt, target: str, *, steps: int, seed: int) -> str:
        """Search the suffix that makes ``target`` likeliest as the opening of the reply.

        Args:
            prompt: What it is put behind.
            target: The opening.
            steps: Most steps; it stops once a candidate's likeliest opening is the target.
            seed: Of the candidates.

        Returns:
            The suffix, the blank in front of it included.

        Raises:
            PromptError: if the prompt is empty or too long.
        """
        length = len(self.model.chat([prompt])[0].ids) + 2 * len(START)
        self.model.check_length(length, prompt)
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), _silence(self._gcg):
            torch.manual_seed(seed)
            return f" {self._search(prompt, target, steps, length)}"

    @cached_property
    def _forbidden(self) -> Int[Tensor, "k"]:
        """Tokens that are not printable ASCII, that are added, or that do not exist."""
        tokenizer = self.model.tokenizer
        added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        plain = [
            index not in added and _is_plain(tokenizer.decode([index]))
            for index in range(len(tokenizer))
        ]
        rows = self.model.model.get_input_embeddings().num_embeddings
        plain += [False] * (rows - len(plain))
        return (~torch.tensor(plain)).nonzero()[:, 0].to(self.model.device)

    def _search(self, prompt: Prompt, target: str, steps: int, length: int) -> str:
        turns = [dict(role=turn.role, content=turn.content) for turn in prompt.history]
        turns.append(dict(role="user", content=f"{prompt.text} {SLOT}"))
        rows = self.model.model.get_input_embeddings().num_embeddings
        how = dict(
            num_steps=steps,
            optim_str_init=START,
            search_width=self.width,
            batch_size=min(64, max(1, self.model.tokens_per_batch // length)),
            topk=min(self.topk, rows - len(self._forbidden)),
            use_prefix_cache=False,
            early_stop=True,
            allow_non_ascii=True,  # what is not allowed is said below
        )
        try:
            return self._run(turns, target, filter_ids=True, **how)
        except RuntimeError as error:
            if "re-encoding" not in str(error):
                raise
            return self._run(turns, target, filter_ids=False, **how)

    def _run(self, turns: list[dict[str, str]], target: str, **how: object) -> str:
        search = self._gcg.GCG(self.model.model, self.model.tokenizer, self._gcg.GCGConfig(**how))
        search.not_allowed_ids = self._forbidden
        return str(search.run(turns, target).best_string)


@contextmanager
def _silence(gcg: Any) -> Iterator[None]:
    """Run nanogcg without its progress bar, its warnings and its full garbage collections."""
    bar, level = gcg.tqdm, gcg.logger.level
    gcg.tqdm = iter
    gcg.logger.setLevel(logging.ERROR)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gcg.logger.setLevel(level)
        gcg.tqdm = bar


def _is_plain(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()
