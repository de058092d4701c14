"""Optional parts of a guard: saved, loaded, digested, asked for each verdict, shown on the card."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from fake_backend import FakeBackend, labelled
from latentguard.errors import GuardError
from latentguard.guard import spec as packing
from latentguard.guard.artifact import CARD_FILE, JSON_FILE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Part


@dataclass(frozen=True, eq=False)
class Colour(Part):
    """Names a category by one direction at a position of its own."""

    name = "colour"
    word: str
    weight: torch.Tensor

    @property
    def positions(self):
        return ("post+1", "t_post")

    def pack(self):
        return {"word": self.word}, {"weight": self.weight}

    @classmethod
    def unpack(cls, record, tensors):
        return cls(record["word"], tensors["weight"])

    def judge(self, states, verdicts):
        found = (states.at("post+1").mean(1) @ self.weight).tolist()
        return [
            replace(v, category=self.word, category_scores={self.word: score})
            for v, score in zip(verdicts, found, strict=True)
        ]

    def notes(self):
        return [f"Knows {self.word}."]


@dataclass(frozen=True)
class Upper(Part):
    """Judges after the other."""

    name = "upper"

    def pack(self):
        return {}, {}

    @classmethod
    def unpack(cls, record, tensors):
        return cls()

    def judge(self, states, verdicts):
        return [replace(v, category=v.category.upper()) for v in verdicts]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(packing, "PARTS", [Colour, Upper])


@pytest.fixture(scope="module")
def plain():
    guard = LatentGuard.fit(FakeBackend(), labelled(30), reading="t_inst")
    return replace(guard, parts=())


@pytest.fixture
def guard(plain):
    return plain.with_part(Upper()).with_part(Colour("red", torch.ones(16)))


class TestParts:
    def test_they_add_to_the_verdict_in_order(self, plain, guard):
        backend = FakeBackend()
        before, after = next(plain.scan(backend, ["good"])), next(guard.scan(backend, ["good"]))
        assert after.category == "RED"
        assert replace(after, category=None, category_scores={}) == before
        assert before.category_scores == {}

    def test_their_positions_are_read(self, plain, guard):
        assert plain.positions == ("t_inst",)
        assert guard.positions == ("t_inst", "post+1", "t_post")

    def test_saved_and_loaded(self, plain, guard, tmp_path):
        guard.save(tmp_path)
        loaded, backend = LatentGuard.load(tmp_path, FakeBackend()), FakeBackend()
        assert loaded.digest == guard.digest != plain.digest
        assert list(loaded.scan(backend, ["bad"])) == list(guard.scan(backend, ["bad"]))
        assert "\nKnows red.\n" in (tmp_path / CARD_FILE).read_text()

    def test_asked_for_by_class(self, plain, guard):
        assert guard.part(Colour).word == "red"
        assert plain.part(Colour) is None

    def test_a_new_one_takes_the_place_of_the_old(self, guard):
        other = guard.with_part(Colour("blue", torch.ones(16)))
        assert other.part(Colour).word == "blue"
        assert [type(part) for part in other.parts] == [Colour, Upper]
        assert other.digest != guard.digest

    def test_an_unknown_part_is_an_error(self, guard, tmp_path, monkeypatch):
        guard.save(tmp_path)
        monkeypatch.setattr(packing, "PARTS", [Upper])
        with pytest.raises(GuardError, match="unknown parts, of a newer version: colour"):
            LatentGuard.load(tmp_path)

    def test_a_damaged_part_is_an_error(self, guard, tmp_path):
        guard.save(tmp_path)
        record = json.loads((tmp_path / JSON_FILE).read_text())
        del record["parts"]["colour"]["word"]
        (tmp_path / JSON_FILE).write_text(json.dumps(record))
        with pytest.raises(GuardError, match="damaged"):
            LatentGuard.load(tmp_path)
