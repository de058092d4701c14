"""Tiny random models on disk, in sizes that vLLM's CPU attention knows, and guards of them."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import torch
import transformers

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reply_fitting import fit_replies
from latentguard.integrations.vllm import parity
from latentguard.integrations.vllm.backend import VllmModel
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt, Reply
from models.families import FAMILIES

SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.08,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
MEMORY = dict(gpu_memory_utilization=0.1, max_model_len=1024)
WORDS = "river garden window teacher engine letter school winter music paper city doctor".split()
KINDS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}


def save_model(kind, folder, *, dtype=torch.float32, seed=0, tied=True, scale=1.0):
    """Write a random model with its tokenizer; some coordinates are large, as in real ones."""
    tokenizer = FAMILIES["qwen2.5"].tokenizer
    config = getattr(transformers, KINDS[kind])(
        **SIZES, vocab_size=len(tokenizer), tie_word_embeddings=tied
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:3] *= 40 * scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fit(folder, out, *, reading="span", probe="linear", dtype="float32"):
    """Fit and save a guard of a saved model, with both axes."""
    rows = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair][:80]
    model = ChatModel.load(folder, dtype=dtype)
    guard = LatentGuard.fit(model, rows, reading=reading, probe=probe)
    scores = sorted(v.score for v in guard.scan(model, TEXTS))
    middle = len(scores) // 2
    replace(guard, threshold=(scores[middle - 1] + scores[middle]) / 2).save(out)
    return LatentGuard.load(out), model


def fit_both(folder, out):
    """Fit and save a guard that also judges replies."""
    guard, model = fit(folder, out)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(60):
        words = list(rng.choice(WORDS, size=12))
        text = (" bad " if n % 2 else " and ").join(words)
        rows.append(Reply(Prompt(f"Question {n // 2}?"), text, harmful=bool(n % 2)))
    fit_replies(model, guard, rows).save(out)
    return LatentGuard.load(out), model


@contextlib.contextmanager
def serving(folder, *options, key):
    """A real server of the guard in a folder, in processes of its own, as its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = "--enforce-eager --block-size 32 --max-num-seqs 16 --max-model-len 1024"
    fixed += f" --api-key {key} --gpu-memory-utilization 0.1 --host 127.0.0.1 --port {port}"
    command = [sys.executable, "-m", "latentguard.integrations.vllm", str(folder / "guard")]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options, *fixed.split()],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


TEXTS = [p.text for p in load_contrast("test")[:40]]
LONG = [" ".join(TEXTS[n : n + 6]) for n in range(0, 24, 6)]
"""Some hundreds of tokens each."""


def start(guard, **options):
    """An engine in this process; the one before is gone."""
    gc.collect()
    how = parity.ENGINE | MEMORY | dict(distributed_executor_backend="uni") | options
    return VllmModel.load(guard, **how)


def stop(model):
    """As the end of its process would."""
    model.engine.llm_engine.engine_core.shutdown()
    model._channel.close()
