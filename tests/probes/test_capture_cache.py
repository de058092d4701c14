"""A killed capture goes on where it stopped; nothing of it stays longer than it is of use."""

import logging
import os
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from fake_backend import FINGERPRINT, FakeBackend
from latentguard.probes import capture_cache
from latentguard.probes.capture_cache import CaptureCache, entry_name
from latentguard.prompts import Prompt
from latentguard.states import States

PROMPTS = [Prompt(f"text {n}", id=f"p{n}", harmful=bool(n % 2)) for n in range(24)]
WHERE = dict(positions=("t_inst", "t_post"), layers=(2, 3))
BATCH = 7
SHARD_BYTES = BATCH * 2 * 2 * 16 * 4


def captured(cache, backend, prompts=PROMPTS, **where):
    return States.collect(cache.capture(backend, prompts, **(WHERE | where)))


def kill_after(cache, backend, batches, prompts=PROMPTS, **where):
    """A run that was killed after so many batches."""
    list(islice(cache.capture(backend, prompts, **(WHERE | where)), batches))


def shards(folder):
    return sorted(path.name for path in Path(folder).rglob("*.safetensors"))


@pytest.fixture
def cache(tmp_path):
    return CaptureCache(tmp_path / "cache")


class TestResuming:
    @pytest.mark.parametrize("batches", [0, 1, 3, 4])
    def test_only_what_is_missing_is_captured_and_the_states_are_the_same(self, cache, batches):
        plain = captured(cache, FakeBackend()).values
        for entry in cache.folder.iterdir():
            for shard in entry.iterdir():
                shard.unlink()
        kill_after(cache, FakeBackend(), batches)
        backend, done = FakeBackend(), []
        states = captured(CaptureCache(cache.folder), backend, progress=done.append)
        assert backend.captured == [prompt.text for prompt in PROMPTS[batches * BATCH :]]
        assert torch.equal(states.values, plain)
        assert states.prompts == tuple(PROMPTS)
        assert states.fingerprint == backend.fingerprint
        assert sum(done) == len(PROMPTS)

    def test_states_of_a_real_model_are_bit_for_bit_the_same(self, model, cache, monkeypatch):
        monkeypatch.setattr("latentguard.models.chat_model.PROMPTS_PER_STATES", 5)
        plain = States.collect(model.capture(PROMPTS, **WHERE))
        kill_after(cache, model, 2)
        states = captured(CaptureCache(cache.folder), model)
        assert torch.equal(states.values, plain.values)
        assert states.values.dtype == plain.values.dtype

    @pytest.mark.parametrize(
        "other",
        [
            dict(prompts=PROMPTS[1:]),
            dict(layers=(2, 4)),
            dict(positions=("t_post", "t_inst")),
            dict(backend=FakeBackend(fingerprint=FINGERPRINT.__class__("x", *"wxyz"))),
        ],
        ids=["prompts", "layers", "positions", "model"],
    )
    def test_states_of_something_else_are_not_taken(self, cache, other):
        kill_after(cache, FakeBackend(), 2)
        backend = other.pop("backend", FakeBackend())
        prompts = other.get("prompts", PROMPTS)
        backend.captured.clear()
        captured(cache, backend, **other)
        assert len(backend.captured) == len(prompts)

    def test_a_damaged_shard_and_all_after_it_are_captured_again(self, cache):
        plain = captured(cache, FakeBackend()).values
        (entry,) = cache.folder.iterdir()
        (entry / "00000007.safetensors").write_bytes(b"torn")
        backend = FakeBackend()
        assert torch.equal(captured(CaptureCache(cache.folder), backend).values, plain)
        assert len(backend.captured) == len(PROMPTS) - BATCH

    def test_shards_hold_no_text(self, cache):
        kill_after(cache, FakeBackend(), 2)
        for shard in cache.folder.rglob("*.safetensors"):
            assert b"text" not in shard.read_bytes()


class TestWhatStays:
    def test_nothing_once_the_block_ends(self, cache):
        with cache:
            captured(cache, FakeBackend())
            assert shards(cache.folder) == [f"{n:08}.safetensors" for n in (0, 7, 14, 21)]
        assert list(cache.folder.iterdir()) == []

    def test_all_of_it_if_the_block_fails(self, cache):
        with pytest.raises(KeyboardInterrupt), cache:
            captured(cache, FakeBackend())
            raise KeyboardInterrupt
        assert len(shards(cache.folder)) == 4

    def test_the_oldest_entries_go_where_all_would_be_too_large(self, tmp_path):
        cache = CaptureCache(tmp_path, max_bytes=9 * SHARD_BYTES)
        names = []
        for n in range(3):
            prompts = [Prompt(f"{n} {p.text}") for p in PROMPTS]
            names.append(entry_name(FakeBackend(), prompts, **WHERE))
            kill_after(CaptureCache(tmp_path, max_bytes=cache.max_bytes), FakeBackend(), 4, prompts)
            os.utime(tmp_path / names[-1], (n + time.time() - 100,) * 2)
        assert {path.name for path in tmp_path.iterdir()} == set(names[1:])

    def test_states_too_large_for_the_cache_are_not_kept_and_this_is_logged(self, tmp_path, caplog):
        cache = CaptureCache(tmp_path, max_bytes=SHARD_BYTES)
        with caplog.at_level(logging.WARNING):
            assert len(captured(cache, FakeBackend())) == len(PROMPTS)
        assert shards(tmp_path) == []
        assert "a killed run starts anew" in caplog.text

    def test_entries_that_nobody_came_back_for_go_by_age(self, cache):
        kill_after(cache, FakeBackend(), 1)
        (entry,) = cache.folder.iterdir()
        old = time.time() - (capture_cache.MAX_DAYS + 1) * 24 * 3600
        os.utime(entry, (old, old))
        kill_after(CaptureCache(cache.folder), FakeBackend(), 1, PROMPTS[1:])
        assert not entry.exists()

    def test_other_files_in_the_folder_are_left_alone(self, cache):
        cache.folder.mkdir()
        (cache.folder / "states-of-mine").write_text("x")
        (cache.folder / "mine").mkdir()
        with cache:
            captured(cache, FakeBackend())
        assert sorted(path.name for path in cache.folder.iterdir()) == ["mine", "states-of-mine"]
