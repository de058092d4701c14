"""Prompts per second and memory of a corpus on Ray, with one actor and with two.

A random Llama of 4 blocks and width 64 with the tokenizer of --tokenizer scores synthetic prompts
of a few words. What is measured is the machinery: reading, templates, tokens, batches, verdicts,
Parquet. Processor time of the actors is counted beside wall time, since a machine may be busy;
their memory is sampled all the while.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.ray import Workers, score_corpus
from latentguard.models.chat_model import ChatModel

WORDS = (
    "tell me how to write a short note about the garden river market teacher engine recipe letter "
    "school winter music travel number window paper history doctor city animal please explain"
).split()


def corpus(path: Path, count: int) -> None:
    """Prompts of 4 to 16 random words, under a fixed seed."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(4, 16))) for _ in range(count)]
    table = pa.table({"id": [f"p{n}" for n in range(count)], "text": texts})
    pq.write_table(table, path, row_group_size=50_000)


def tiny_model(folder: Path, tokenizer: str) -> str:
    """Random weights under a real tokenizer and chat template."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    config = LlamaConfig(
        vocab_size=len(words), num_attention_heads=4, max_position_embeddings=2048, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


class Watch(threading.Thread):
    """Samples memory and processor time of the actors."""

    def __init__(self, seconds: float) -> None:
        """Sample every so many seconds."""
        super().__init__(daemon=True)
        self.seconds, self.stopped = seconds, threading.Event()
        self.samples: list[dict[str, Any]] = []

    def run(self) -> None:
        """Sample until stopped."""
        start = time.perf_counter()
        while not self.stopped.wait(self.seconds):
            sample: dict[str, Any] = {"at": round(time.perf_counter() - start, 1), "actors": {}}
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in " ".join(process.cmdline()):
                        used = process.cpu_times()
                        seen = {"mib": process.memory_info().rss >> 20}
                        seen["cpu"] = round(used.user + used.system, 1)
                        sample["actors"][process.pid] = seen
                except psutil.Error:
                    continue
            self.samples.append(sample)


def measure(guard: LatentGuard, source: Path, out: Path, actors: int, rows: int) -> dict[str, Any]:
    """Score the whole; the clock starts when the first block is done, so loading is not counted."""
    shutil.rmtree(out, ignore_errors=True)
    watch, marks = Watch(2.0), []
    watch.start()
    workers = Workers(actors, rows)
    total = score_corpus(
        guard,
        str(source),
        out,
        workers=workers,
        progress=lambda count: marks.append((time.perf_counter(), count, _cpu(watch), _mib())),
    )
    watch.stopped.set()
    watch.join()
    (first, _, before, _), (last, _, after, _) = marks[1], marks[-1]
    done = sum(count for _, count, *_ in marks[2:])
    memory = [sum(a["mib"] for a in s["actors"].values()) for s in watch.samples if s["actors"]]
    busy = memory[len(memory) // 4 :]
    quarter = max(len(busy) // 3, 1)
    return {
        "actors": actors,
        "rows": total.rows,
        "prompts_per_second": done / (last - first),
        "prompts_per_actor_cpu_second": done / max(after - before, 1e-9),
        "actors_mib": {
            "early": statistics.median(busy[:quarter]),
            "late": statistics.median(busy[-quarter:]),
            "peak": max(memory),
        },
        "driver_mib": {"first": marks[1][3], "last": marks[-1][3]},
        "bytes_per_row": sum(p.stat().st_size for p in out.glob("part-*")) / total.rows,
        "samples": watch.samples,
    }


def _mib() -> int:
    return int(psutil.Process().memory_info().rss >> 20)


def _cpu(watch: Watch) -> float:
    seen = watch.samples[-1]["actors"].values() if watch.samples else ()
    return float(sum(actor["cpu"] for actor in seen))


def main() -> None:
    """Make the corpus, score it, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of a chat model")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--actors", default="1,2")
    parser.add_argument("--block-rows", type=int, default=8192)
    parser.add_argument("--folder", type=Path, required=True, help="for corpus and verdicts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = options.folder / "corpus.parquet"
    corpus(source, options.count)
    model = ChatModel.load(tiny_model(options.folder / "model", options.tokenizer))
    guard = LatentGuard.fit(model, load_contrast("validation"), probe="centroid")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    found = []
    for actors in map(int, options.actors.split(",")):
        out = options.folder / f"out-{actors}"
        found.append(measure(guard, source, out, actors, options.block_rows))
        print({k: v for k, v in found[-1].items() if k != "samples"})
    if options.json:
        options.json.write_text(json.dumps({"versions": {"ray": ray.__version__}, "runs": found}))


if __name__ == "__main__":
    main()
