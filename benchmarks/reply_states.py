"""Captures what ``replies.py`` compares: states at the tokens of replies, and of their prompts.

    python benchmarks/reply_states.py --model M --data-dir DIR --cache DIR [--rows N] [--tokens N]

DIR holds replies_beavertails_half.jsonl and replies_saferlhf_half.jsonl (id, prompt, reply, label).
States go to the cache in shards, so a killed run goes on. No text is written or printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentguard.models.chat_model import ChatModel
from latentguard.models.layout import CaptureRow
from latentguard.models.reply_reading import lay_out_reply
from latentguard.probes.probe import layers_of
from latentguard.prompts import Prompt, Reply
from latentguard.states import Reading, States

T = TypeVar("T")

SETS = ("beavertails", "saferlhf")
SHARD = 100
"""Replies of a shard."""


@dataclass(frozen=True, eq=False)
class TokenStates:
    """States at the tokens of some replies, one after the other."""

    values: Tensor
    """Float16, [tokens l d]."""

    starts: list[int]
    """Where each reply begins, and where the last one ends."""

    def of_reply(self, row: int) -> Tensor:
        """The states of one reply, [t l d], float32."""
        return self.values[self.starts[row] : self.starts[row + 1]].float()


def read_replies(folder: Path, name: str, count: int) -> list[Reply]:
    """The first rows of a set, in an order that a fixed seed draws."""
    lines = (folder / f"replies_{name}_half.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [
        Reply(Prompt(row["prompt"], id=row["id"]), row["reply"], harmful=row["label"] == "harmful")
        for row in (rows[i] for i in order)
        if row["reply"].strip()
    ]


def cut_replies(model: ChatModel, replies: Sequence[Reply], tokens: int) -> list[Reply]:
    """The same replies, each as its first tokens and the text that they spell."""
    kept = []
    for reply in replies:
        layout = lay_out_reply(model, reply).cut(tokens)
        ids = layout.ids[layout.start :]
        kept.append(replace(reply, text=model.tokenizer.decode(ids), ids=ids))
    return kept


def token_states(model: ChatModel, replies: Sequence[Reply], folder: Path) -> TokenStates:
    """States at every token of the replies, at the layers of a linear probe."""
    layers = layers_of("linear", model.depth)

    def read(part: Sequence[Reply]) -> dict[str, Tensor]:
        layouts = [lay_out_reply(model, reply) for reply in part]
        states: list[Tensor] = [torch.empty(0)] * len(part)

        def batch(numbers: list[int]) -> None:
            most = max(len(layouts[i].reply) for i in numbers)
            rows = []
            for i in numbers:
                columns = [*layouts[i].reply]
                columns += columns[-1:] * (most - len(columns))
                rows.append(CaptureRow.of_spans(layouts[i].ids, [(c, c) for c in columns]))
            for i, values in zip(numbers, model.read_batch(rows, layers), strict=True):
                states[i] = values[: len(layouts[i].reply)].half()

        model.run_in_batches([len(layout.ids) for layout in layouts], batch)
        lengths = torch.tensor([len(layout.reply) for layout in layouts])
        return {"values": torch.cat(states), "lengths": lengths}

    shards = _shards(replies, folder, read)
    lengths = torch.cat([shard["lengths"] for shard in shards])
    starts = [0, *lengths.cumsum(0).tolist()]
    return TokenStates(torch.cat([shard["values"] for shard in shards]), starts)


def pooled_states(model: ChatModel, prompts: Sequence[Prompt], folder: Path) -> States:
    """States of prompts where ``pooled`` reads."""
    layers = layers_of("linear", model.depth)
    positions = Reading.of("pooled", model.post).positions

    def read(part: Sequence[Prompt]) -> dict[str, Tensor]:
        states = States.collect(model.capture(part, positions=positions, layers=layers))
        return {"values": states.values}

    shards = _shards(prompts, folder, read)
    values = torch.cat([shard["values"] for shard in shards])
    return States(values, tuple(prompts), positions, layers, model.fingerprint)


def as_one_text(reply: Reply) -> Prompt:
    """Prompt and reply as one message, labelled as the reply is."""
    text = f"{reply.prompt.text}\n\n{reply.text}"
    return Prompt(text, id=reply.prompt.id, harmful=reply.harmful, pair=reply.prompt.text)


def _shards(
    items: Sequence[T], folder: Path, read: Callable[[Sequence[T]], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(items), SHARD):
        path = folder / f"{start:05}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(read(items[start : start + SHARD]), partial)
            partial.rename(path)
            print(path, flush=True)
        shards.append(load_file(path))
    return shards


def main() -> None:
    """Capture all that ``replies.py`` reads."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = ChatModel.load(options.model, dtype=options.dtype)
    sets = dict[str, list[Reply]]()
    for name in SETS:
        replies = read_replies(options.data_dir, name, options.rows)
        sets[name] = cut_replies(model, replies, options.tokens)
        token_states(model, sets[name], options.cache / name / "tokens")
    for name, replies in sets.items():
        pooled_states(model, [reply.prompt for reply in replies], options.cache / name / "prompts")
    for name, replies in sets.items():
        texts = [as_one_text(reply) for reply in replies]
        pooled_states(model, texts, options.cache / name / "one-text")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for captured states")
    parser.add_argument("--rows", type=int, default=1500, help="most replies of a set")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of a reply")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
