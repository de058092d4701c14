"""Tiny random models on disk, in sizes that vLLM's CPU attention knows, and guards of them."""

import gc

import torch
import transformers

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.vllm import parity
from latentguard.integrations.vllm.backend import VllmModel
from latentguard.models.chat_model import ChatModel
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
    from dataclasses import replace

    rows = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair][:80]
    model = ChatModel.load(folder, dtype=dtype)
    guard = LatentGuard.fit(model, rows, reading=reading, probe=probe)
    scores = sorted(v.score for v in guard.scan(model, TEXTS))
    middle = len(scores) // 2
    replace(guard, threshold=(scores[middle - 1] + scores[middle]) / 2).save(out)
    return LatentGuard.load(out), model


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
