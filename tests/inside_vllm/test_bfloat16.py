"""In bfloat16 both backends round differently: how far apart they are is bounded, and told."""

import pytest
import torch

from inside_vllm import tiny
from latentguard.integrations.vllm import parity
from latentguard.prompts import Prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

PROMPTS = [Prompt(text, id=str(n)) for n, text in enumerate([*tiny.TEXTS, *tiny.LONG])]


def test_scores_are_within_a_fifth_of_their_spread(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tiny.save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    guard, hf = tiny.fit(str(tmp_path / "model"), tmp_path / "guard", dtype="bfloat16")
    reference = list(guard.scan(hf, PROMPTS))
    model = tiny.start(tmp_path / "guard")
    found = parity.compare(guard, reference, model, PROMPTS)
    assert max(d.spread for d in found) < 0.2
    tiny.stop(model)
