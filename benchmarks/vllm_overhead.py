"""What the guard costs inside vLLM: time to the first token, scoring on and off in one engine.

``fit`` makes a guard on a part of the contrast set. ``measure`` starts one engine for it, in this
process and on one thread, and has it compute the same prompts with scoring on and off, in pairs and
in random order, with an empty prefix cache each time. On includes laying out the prompts for the
guard. Off means: the model hands out no extra states and no request carries a pending; the
connector stays, since an engine cannot drop it.

Printed for each condition: the median over pairs of on/off, less one, in per cent, with a 95 %
bootstrap interval (2,000 draws of pairs), in processor time, which other work on the machine
disturbs least, and in wall time. Runs in the environment of ``make vllm-env``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.stats.bootstrap import bootstrap

LONG = 512
PAIRS = {"1 short": 40, f"1 of {LONG}": 12, "32 short": 8, f"32 of {LONG}": 3}
"""How often each condition is measured; the last takes most of the time."""


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["fit", "measure"])
    parser.add_argument("--model", default="default")
    parser.add_argument("--guard", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--conditions", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.job == "fit":
        fit(asked)
    else:
        text = json.dumps(measure(asked), indent=1)
        sys.stdout.write(f"{text}\n")
        if asked.out:
            asked.out.write_text(f"{text}\n", encoding="utf-8")


def fit(asked: argparse.Namespace) -> None:
    """A guard with the default reading and probe."""
    rows = [p for p in load_contrast("train") if p.pair][: asked.rows]
    LatentGuard.fit(ChatModel.load(asked.model, dtype=asked.dtype), rows).save(asked.guard)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Every condition, in one engine."""
    from latentguard.integrations.vllm.backend import VllmModel

    model = VllmModel.load(
        asked.guard,
        None if asked.model == "default" else asked.model,
        enforce_eager=True,
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.2,
        max_model_len=1024,
        max_num_seqs=32,
    )
    found = {}
    for condition in asked.conditions:
        count, length = condition.split(" ", 1)
        prompts = material(model, int(count), LONG if length != "short" else None)
        found[condition] = condition_of(model, prompts, PAIRS[condition])
        sys.stderr.write(f"{condition}: {found[condition]}\n")
    layers = model.columns.layers
    about = dict(layers=f"{layers[0]}-{layers[-1]}", columns=len(model.columns.positions))
    return dict(model=Path(str(asked.model)).name, dtype=asked.dtype, **about, found=found)


def material(model: Any, count: int, length: int | None) -> list[Prompt]:
    """Harmless prompts of the test split; if a length is given, joined to nearly so many tokens."""
    texts = [p.text for p in load_contrast("test") if not p.harmful]
    if length is None:
        return [Prompt(text, id=str(n)) for n, text in enumerate(texts[:count])]
    found = []
    for n in range(count):
        words = f"{n} {' '.join(texts[n:] + texts[:n])}".split()
        low, high = 1, len(words)
        while low < high:  # the most words that fit
            middle = (low + high + 1) // 2
            size = len(model.chat([Prompt(" ".join(words[:middle]))])[0].ids)
            low, high = (middle, high) if size <= length else (low, middle - 1)
        found.append(Prompt(" ".join(words[:low]), id=str(n)))
    return found


def condition_of(model: Any, prompts: list[Prompt], pairs: int) -> dict[str, Any]:
    """Pairs of on and off, after one warm-up of each."""
    ids = [list(layout.ids) for layout in model.chat(prompts)]
    arms = {
        "on": lambda: run(model, ids, prompts),
        "off": lambda: run(model, ids, ()),
    }
    order, rows = random.Random(0), list[dict[str, tuple[float, float]]]()
    for number in range(pairs + 1):
        names = order.sample(sorted(arms), 2)
        row = {name: timed(arms[name]) for name in names}
        if number:
            rows.append(row)
    mean = statistics.mean(map(len, ids))
    result: dict[str, Any] = dict(pairs=pairs, mean_tokens=round(mean, 1))
    for place, clock in enumerate(("processor", "wall")):
        extra = np.array([row["on"][place] / row["off"][place] - 1 for row in rows])
        ratio = bootstrap(np.median, extra, method="percentile", draws=2000)
        result[clock] = [round(100 * v, 2) for v in (ratio.value, ratio.low, ratio.high)]
        result[f"{clock}_off_s"] = round(statistics.median(r["off"][place] for r in rows), 4)
    return result


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Processor seconds of this process, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def run(model: Any, ids: list[list[int]], guarded: Sequence[Prompt]) -> None:
    """The first token of each prompt, all at once; scored if the prompts are given."""
    from vllm import SamplingParams

    from latentguard.integrations.vllm import model as inside
    from latentguard.integrations.vllm.score_request import score_request

    layers = model.columns.layers if guarded else ()
    inside.models[-1].set_aux_hidden_state_layers(layers)
    model.engine.reset_prefix_cache()
    extra: list[dict[str, Any] | None] = [None] * len(ids)
    for number, layout in enumerate(model.chat(guarded)):
        ask = score_request(layout, model.columns.positions, model._channel)
        extra[number] = {"kv_transfer_params": ask.params}
    how = [SamplingParams(max_tokens=1, temperature=0.0, extra_args=more) for more in extra]
    tokens = [{"prompt_token_ids": row} for row in ids]
    model.engine.generate(tokens, how, use_tqdm=False)
    assert len(model._channel.collect()) == len(guarded)


if __name__ == "__main__":
    main()
