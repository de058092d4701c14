"""What judging a reply costs a token, where the model writes it and where it follows another's.

    python benchmarks/reply_overhead.py --model M [--prompts N] [--tokens N] [--out F.json]

Decoding with and without the probe, in turns on the same prompts; processor time, so that other
work on the machine counts less. Following: tokens of the same replies, read in chunks.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from latentguard.data.builtin import load_guard_prompts
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import Conversation, Sampling, TokenProbe
from latentguard.models.reply_reading import ReplyReader
from latentguard.probes.probe import layers_of
from latentguard.prompts import Prompt
from latentguard.stats.bootstrap import bootstrap

CHUNKS = (1, 8, 32)


def decode(
    model: ChatModel, prompt: Prompt, probe: TokenProbe | None, tokens: int
) -> tuple[float, int, str]:
    """Seconds of decoding, tokens and text of a greedy reply."""
    said = Conversation(model, prompt, positions=(), layers=(1,), probe=probe)
    began = process_time()
    text = "".join(p.text for p in said.pieces(Sampling(max_tokens=tokens, temperature=0)))
    return process_time() - began, said.reply_tokens, text


def follow(model: ChatModel, prompt: Prompt, probe: TokenProbe, text: str, chunk: int) -> float:
    """Seconds a token of reading a reply that grows by a chunk of tokens."""
    reader = ReplyReader(model, prompt, probe.layers, probe.weight)
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    ends = [*range(chunk, len(ids), chunk), len(ids)]
    reader.read(model.tokenizer.decode(ids[:1]), is_whole=False)  # the prompt is read here
    began = process_time()
    for end in ends:
        reader.read(model.tokenizer.decode(ids[:end]), is_whole=end == len(ids))
    return (process_time() - began) / len(ids)


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    model = ChatModel.load(options.model)
    layers = layers_of("linear", model.depth)
    probe = TokenProbe(layers, torch.randn(len(layers), model.width) / 100)
    harmless = [p for p in load_guard_prompts("test") if not p.harmful and len(p.text) < 200]
    prompts = harmless[: options.prompts]
    decode(model, prompts[0], probe, 4)  # what is loaded at first use
    plain, read, followed = [], [], {chunk: list[float]() for chunk in CHUNKS}
    for number, prompt in enumerate(prompts):
        runs: dict[bool, tuple[float, int, str]] = {}
        for is_read in (number % 2 == 0, number % 2 == 1):
            own = probe if is_read else None
            runs[is_read] = decode(model, prompt, own, options.tokens)
        plain.append(runs[False][0] / (runs[False][1] - 1))  # the last token is not read there
        read.append(runs[True][0] / runs[True][1])
        for chunk in CHUNKS:
            followed[chunk].append(follow(model, prompt, probe, runs[True][2], chunk))
    share: Callable[..., float] = lambda a, b: float(np.sum(b) / np.sum(a) - 1)  # noqa: E731
    record: dict[str, Any] = dict(
        model=model.source,
        device=str(model.device),
        processor=platform.machine(),
        prompts=len(prompts),
        tokens=options.tokens,
        plain_ms=1000 * float(np.mean(plain)),
        read_ms=1000 * float(np.mean(read)),
        overhead=asdict(bootstrap(share, np.array(plain), np.array(read), paired=True)),
        followed_ms={str(chunk): 1000 * float(np.mean(own)) for chunk, own in followed.items()},
    )
    print(json.dumps(record, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
