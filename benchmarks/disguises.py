"""Obfuscations: how much ordinary text looks disguised, what that changes, what it costs.

    python benchmarks/disguises.py --model M --guard G --data-dir DIR [--dtype D] [--out F.json]

G is as ``fit`` makes it, and fitted if it is not there. Of each set of DIR (JSON Lines) and of the
guard prompts' held-out splits: how many prompts are read more than once, by which disguise, and
how many of these are flagged with and without it. Cost: microseconds of ``deobfuscate``,
and ``scan`` with the part over ``scan`` without it, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from default_guard import default_guard

from latentguard.data.builtin import load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.text.deobfuscation import deobfuscate

ROUNDS, SHORT = 9, 96


def main() -> None:
    """Count, score, time."""
    options = arguments()
    torch.set_num_threads(1)
    model = ChatModel.load(options.model, dtype=options.dtype)
    guard = replace(default_guard(model, options.guard), deobfuscate=True)
    sets = {path.stem: read_prompts(path) for path in sorted(options.data_dir.glob("*.jsonl"))}
    sets |= {
        f"guard prompts, {split}": load_guard_prompts(split) for split in ("validation", "test")
    }
    found = {name: told(guard, model, prompts) for name, prompts in sets.items()}
    record = dict(model=Path(options.model).name, sets=found, scan=ratios(guard, model))
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1))


def told(guard: LatentGuard, model: ChatModel, prompts: list[Prompt]) -> dict[str, Any]:
    """Of one set."""
    began = time.process_time()
    texts = [deobfuscate(prompt.text) for prompt in prompts]
    spent = (time.process_time() - began) / len(prompts)
    twice = [p for p, beneath in zip(prompts, texts, strict=True) if beneath]
    record: dict[str, Any] = dict(n=len(prompts), read_twice=len(twice), microseconds=spent * 1e6)
    record["obfuscations"] = Counter(
        name for beneath in texts for names in beneath.values() for name in names
    )
    for side, label in ((True, "harmful"), (False, "harmless")):
        mine = [p for p in twice if p.harmful is side]
        flags = [flagged(one, model, mine) for one in (bare(guard), guard)]
        record[label] = dict(read_twice=len(mine), flagged_before=flags[0], flagged=flags[1])
    return record


def bare(guard: LatentGuard) -> LatentGuard:
    """The guard without the second reading."""
    return replace(guard, deobfuscate=False)


def flagged(guard: LatentGuard, model: ChatModel, prompts: list[Prompt]) -> int:
    """How many are flagged."""
    return sum(verdict.flagged for verdict in guard.scan(model, prompts))


def ratios(guard: LatentGuard, model: ChatModel) -> dict[str, Any]:
    """Processor time of ``scan`` with the part over that without, on prompts that are read once."""
    prompts, draw = load_guard_prompts("test")[:SHORT], random.Random(0)
    arms, found = {"with": guard, "without": bare(guard)}, list[float]()
    for _ in range(ROUNDS):
        spent = {}
        for name in draw.sample(list(arms), 2):
            began = time.process_time()
            list(arms[name].scan(model, prompts))
            spent[name] = time.process_time() - began
        found.append(spent["with"] / spent["without"])
    return dict(n=len(prompts), rounds=sorted(found), median=median(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--guard", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
