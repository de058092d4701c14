"""How time and memory grow with what is asked: length, layers, batch, guards, prompts.

    python benchmarks/growth.py --model M --out F.json --do length,layers,batch,guards,prompts
    python benchmarks/growth.py --out F.json --show

Processor time on one thread, and the memory that a call needs beyond what is resident before it.
Each run adds one repetition to F.json, so that a long measurement is made of short runs; ``--show``
fits time = c * size ** exponent to all of them. The model is real but for ``prompts``, which takes
a random one of two narrow blocks: there it is all that surrounds the model that is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peers import reset_peak, resident
from scipy.stats import linregress, t

from latentguard.data.builtin import load_contrast
from latentguard.files import write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.probes.fitting import capture
from latentguard.prompts import Prompt
from latentguard.states import Reading

SIZES = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "layers": (1, 2, 4, 8, 15, 30),
    "batch": (1, 2, 4, 8, 16, 32),
    "guards": (1, 2, 5, 10, 20, 50),
    "prompts": (1_000, 3_000, 10_000, 30_000, 100_000, 1_000_000),
}
SHALLOW = 4
"""The layer at which the length is measured, so that 8,192 tokens take seconds."""

TRAINING = 48
"""Prompts that the guards are fitted on: what they know does not matter here."""


def short(count: int) -> Iterator[Prompt]:
    """Prompts of one length, all different."""
    for number in range(count):
        yield Prompt(f"Please say in a few words how one writes {number:07}", id=str(number))


def long(model: ChatModel, tokens: int) -> Prompt:
    """A prompt of so many tokens, template included."""
    bare = len(model.chat([Prompt("a")])[0].ids)
    return Prompt("a" + " word" * (tokens - bare), id=str(tokens))


def calls(what: str, model: ChatModel) -> Callable[[int], Any]:
    """What is measured, as a function of the size."""
    if what == "length":
        return lambda size: drain(model.capture([long(model, size)], layers=(SHALLOW,)))
    if what == "layers":
        return lambda size: drain(model.capture(short(8), layers=range(size + 1)))
    if what == "guards":
        panel = guards(model)
        return lambda size: judge_all(panel[:size], model, short(16))
    return lambda size: drain(model.capture(short(size)))


def judge_all(panel: Sequence[LatentGuard], model: ChatModel, prompts: Sequence[Prompt]) -> None:
    """Several guards on one capture."""
    positions = tuple(dict.fromkeys(p for guard in panel for p in guard.positions))
    layers = sorted({layer for guard in panel for layer in guard.probe.layers})
    for states in model.capture(prompts, positions=positions, layers=layers):
        for guard in panel:
            guard.judge(states)


def drain(results: Iterator[Any]) -> None:
    """Consume, keeping nothing."""
    for _ in results:
        pass


def guards(model: ChatModel) -> list[LatentGuard]:
    """Fifty guards of five kinds, read at every position of the span."""
    prompts = [p for p in load_contrast("train") if p.pair][:TRAINING]
    states = capture(model, Reading.of("span", model.post), prompts)
    kinds = [("span", "linear"), ("t_inst", "linear"), ("t_post", "linear")]
    kinds += [("t_inst", "centroid"), ("span", "centroid")]
    fitted = [
        LatentGuard.from_states(model, states, Reading.of(reading, model.post), probe)
        for reading, probe in kinds
    ]
    return [replace(fitted[i % 5], threshold=float(i)) for i in range(max(SIZES["guards"]))]


def narrow(tokenizer: Any) -> ChatModel:
    """A random model of two narrow blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    return ChatModel(LlamaForCausalLM(config), tokenizer, source="random")


def measure(what: str, model: ChatModel, largest: int) -> Iterator[dict[str, Any]]:
    """One repetition: each size once, after a warm call of the smallest."""
    call, sizes = calls(what, model), [size for size in SIZES[what] if size <= largest]
    if what == "batch":
        model.tokens_per_batch = 1 << 14  # all of them in one pass
    call(sizes[0])
    for size in sizes:
        reset_peak()
        before, start = resident(), time.process_time()
        call(size)
        seconds, extra = time.process_time() - start, resident(peak=True) - before
        yield dict(what=what, size=size, seconds=round(seconds, 4), extra_mib=round(extra, 1))


def fit(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The exponent of time in size, and its 95 % interval, by least squares on logarithms."""
    found = linregress(*(np.log([row[key] for row in rows]) for key in ("size", "seconds")))
    half = found.stderr * t.ppf(0.975, len(rows) - 2)
    return found.slope, found.slope - half, found.slope + half


def show(rows: list[dict[str, Any]]) -> None:
    """Markdown: medians by size, then the exponents over all sizes and over the upper half."""
    for what in SIZES:
        own = [row for row in rows if row["what"] == what]
        sizes = sorted({row["size"] for row in own})
        if len(sizes) < 3:
            continue
        print(
            f"\n| {what} | seconds: median (range) | repetitions | extra MiB |\n|---|---|---|---|"
        )
        for size in sizes:
            at = [row for row in own if row["size"] == size]
            seconds, extra = [r["seconds"] for r in at], max(r["extra_mib"] for r in at)
            spread = f"{median(seconds):.3g} ({min(seconds):.3g}-{max(seconds):.3g})"
            print(f"| {size:,} | {spread} | {len(at)} | {extra:,.0f} |")
        upper = [row for row in own if row["size"] >= sizes[len(sizes) // 2 - 1]]
        for name, part in (("all sizes", own), (f"from {upper[0]['size']:,} on", upper)):
            print("\nexponent over {}: {:.2f} [{:.2f}, {:.2f}]".format(name, *fit(part)))


def main() -> None:
    """Measure and add to the file, or show what is in it."""
    options = arguments()
    torch.set_num_threads(1)
    out = Path(options.out)
    rows = json.loads(out.read_text()) if out.exists() else []
    if options.show:
        show(rows)
        return
    model = ChatModel.load(options.model, dtype="float32", device="cpu")
    for what in options.do.split(","):
        measured = narrow(model.tokenizer) if what == "prompts" else model
        for row in measure(what, measured, options.largest):
            print(row)
            rows.append(row)
            write_atomic(out, json.dumps(rows).replace("}, ", "},\n "))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", required=True)
    parser.add_argument("--do", default="length,layers,batch,guards,prompts")
    parser.add_argument("--largest", type=int, default=10_000, help="leave out larger sizes")
    parser.add_argument("--show", action="store_true", help="print tables and exponents")
    return parser.parse_args()


if __name__ == "__main__":
    main()
