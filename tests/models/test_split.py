"""Tensor parallel: a model that is split over two processes is the same model to a guard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import latentguard
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.loading import load_checkpoint
from latentguard.states import States
from models.architectures import chat_model
from models.split_process import HAS_DISTRIBUTED_PLAN, LIMIT, guard_of, replies, shrinks, states

RANKS = (0, 1)
TORCHRUN = (sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split())
IMPORTS = (Path(__file__).parents[1], Path(latentguard.__file__).parents[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def plain(folder, tokenizer):
    """The model in one piece; ``edited`` differs in what the second process keeps of a matrix."""
    made = chat_model("llama", tokenizer)
    for name in ("whole", "edited"):
        made.model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            made.model.model.layers[1].mlp.up_proj.weight[-1] += 1e-3
    return ChatModel.load(folder / "whole")


@pytest.fixture(scope="module")
def found(folder, plain):
    """What each process saw."""
    guard_of(plain).save(folder / "guard")
    paths = [str(folder / name) for name in ("whole", "edited", "guard", "out")]
    run = subprocess.run(
        [*TORCHRUN, "-m", "models.split_process", *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, IMPORTS)), "PYTHONSAFEPATH": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT + 30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"out/{rank}/found.json").read_text()) for rank in RANKS]


class TestTwoProcesses:
    def test_each_keeps_half_of_the_matrices(self, found, plain):
        matrices = 7 * plain.depth + 1  # of the blocks, and the head; since 5.24 the embedding too
        for one in found:
            assert set(one["shards"]) == {0.5}
            assert matrices <= len(one["shards"]) <= matrices + 1

    def test_states_are_whole_in_both(self, found, plain, folder):
        first, second = (States.load(folder / f"out/{rank}/states") for rank in RANKS)
        assert torch.equal(first.values, second.values)
        wanted = states(plain).values
        assert first.values.shape == wanted.shape
        # sums of two halves are rounded otherwise: a few float32 steps at states of about 1
        assert torch.allclose(first.values, wanted, rtol=0, atol=1e-5)

    def test_replies_plain_and_steered(self, found, plain):
        assert [one["replies"] for one in found] == [
            [list(map(list, r)) for r in replies(plain)]
        ] * 2

    def test_the_digest_is_that_of_the_whole_weights(self, found, plain):
        assert [one["digest"] for one in found] == [plain.fingerprint.digest] * 2

    def test_a_guard_of_the_whole_model_loads(self, found):
        assert [one["refusals"][0] for one in found] == ["", ""]

    def test_a_guard_refuses_weights_that_another_process_keeps(self, found):
        assert all(": weights " in one["refusals"][1] for one in found)

    def test_a_guard_that_was_fitted_there_loads_on_the_whole_model(self, found, plain, folder):
        guards = [LatentGuard.load(folder / f"out/{rank}/guard", plain) for rank in RANKS]
        assert guards[0].digest == guards[1].digest

    def test_none_goes_on_with_a_smaller_batch_of_its_own(self, found, plain):
        assert [one["shrinks"] for one in found] == [False, False]
        assert shrinks(ChatModel(plain.model, plain.tokenizer))


@pytest.mark.skipif(not HAS_DISTRIBUTED_PLAN, reason="transformers takes no such option")
def test_in_one_process_nothing_is_split_so_the_device_holds(plain, folder):
    plan = {"distributed_config": {"tp_plan": "auto"}}
    loaded = load_checkpoint(folder / "whole", "float32", "meta", plan)
    assert loaded.network.device.type == "meta"
