"""States: picking rows, layers and positions; files; what a fingerprint binds."""

import dataclasses

import pytest
import torch

from fake_backend import FINGERPRINT, FakeBackend, labelled
from latentguard.errors import GuardError
from latentguard.prompts import Message, Prompt
from latentguard.states import Backend, Fingerprint, States, digest_prompts

PROMPTS = [
    Prompt("plain"),
    Prompt("safe and answered", id="1", harmful=False, refused=False),
    Prompt("bad and refused", id="2", harmful=True, refused=True, category="hate", source="here"),
    Prompt("late", pair="7", history=(Message("system", "Be brief."), Message("user", ""))),
    Prompt('é ☃ 漢字 "quoted"\n\ttab', id="odd"),
]


@pytest.fixture
def states():
    return States.collect(FakeBackend(batch=2).capture(PROMPTS))


class TestPicking:
    def test_collect_keeps_the_order(self, states):
        assert [p.text for p in states.prompts] == [p.text for p in PROMPTS]
        whole = next(FakeBackend(batch=99).capture(PROMPTS))
        assert torch.equal(states.values, whole.values)
        assert (len(states), states.positions) == (5, ("t_inst", "t_post"))
        assert states.layers == tuple(range(7))

    def test_collect_of_none(self):
        with pytest.raises(GuardError, match="expected at least one prompt, found none"):
            States.collect([])
        with pytest.raises(GuardError, match="found none"):
            States.collect(FakeBackend().capture([]))

    def test_at(self, states):
        assert torch.equal(states.at("t_post"), states.values[:, 1])
        with pytest.raises(KeyError, match=r"post\+1.*t_inst"):
            states.at("post+1")

    def test_where(self, states):
        kept = states.where(lambda p: p.harmful is not None)
        assert [p.id for p in kept.prompts] == ["1", "2"]
        assert torch.equal(kept.values, states.values[1:3])
        assert len(states.where(lambda p: False)) == 0
        assert states.where(lambda p: False).values.shape == (0, 2, 7, 16)

    def test_select(self, states):
        some = states.select([5, 2])
        assert some.layers == (5, 2)
        assert torch.equal(some.values, states.values[:, :, [5, 2]])
        assert torch.equal(some.select((2,)).values, states.values[:, :, [2]])
        assert states.select(states.layers) is states
        with pytest.raises(KeyError, match=r"\[8, 9\]"):
            states.select([1, 8, 9])

    def test_values_of_another_shape(self, states):
        for change in (
            dict(prompts=states.prompts[:2]),
            dict(positions=("t_inst",)),
            dict(layers=(0, 1)),
        ):
            with pytest.raises(ValueError, match="expected"):
                dataclasses.replace(states, **change)

    def test_the_fake_is_a_backend(self):
        wanted = {name for name in vars(Backend) if not name.startswith("_")}
        assert wanted >= {"fingerprint", "depth", "post", "capture"}
        assert FakeBackend().fingerprint == FINGERPRINT


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip(self, states, tmp_path, dtype):
        states = dataclasses.replace(states, values=states.values.to(dtype)).select((1, 4))
        states.save(tmp_path / "new" / "s.safetensors")
        loaded = States.load(tmp_path / "new" / "s.safetensors")
        assert torch.equal(loaded.values, states.values)
        assert loaded.values.dtype == dtype
        assert loaded.prompts == states.prompts
        assert (loaded.positions, loaded.layers) == (states.positions, (1, 4))
        assert loaded.fingerprint == states.fingerprint
        assert [f.name for f in (tmp_path / "new").iterdir()] == ["s.safetensors"]

    def test_labels_survive(self, tmp_path):
        States.collect(FakeBackend().capture(labelled(3))).save(tmp_path / "s")
        assert [p.harmful for p in States.load(tmp_path / "s").prompts] == [True, False] * 3

    def test_a_save_that_fails_leaves_the_old_file(self, states, tmp_path, monkeypatch):
        states.save(tmp_path / "s")

        def full(*_, **__):
            raise OSError("no space left")

        monkeypatch.setattr("latentguard.states.save_file", full)
        with pytest.raises(OSError, match="no space"):
            states.select((0,)).save(tmp_path / "s")
        assert States.load(tmp_path / "s").layers == states.layers


class TestFingerprint:
    def test_the_place_does_not_bind(self):
        moved = dataclasses.replace(FINGERPRINT, model="elsewhere")
        assert FINGERPRINT.differences(moved) == []
        assert FINGERPRINT.digest == moved.digest

    @pytest.mark.parametrize("name", ["weights", "tokenizer", "template", "dtype"])
    def test_the_rest_binds(self, name):
        other = dataclasses.replace(FINGERPRINT, **{name: "x" * 64})
        was = getattr(FINGERPRINT, name)[:12]
        (said,) = FINGERPRINT.differences(other)
        assert said.startswith(f"{name} {'x' * 12} instead of {was}")
        assert ("(" in said) == (name != "dtype")
        assert FINGERPRINT.digest != other.digest

    def test_all_at_once(self):
        other = Fingerprint("m", "w", "t", "c", "d")
        words = [line.split()[0] for line in FINGERPRINT.differences(other)]
        assert words == ["weights", "tokenizer", "template", "dtype"]


class TestDigest:
    def test_it_is_of_what_was_said_and_of_the_label(self):
        one = [Prompt("a", harmful=True), Prompt("b")]
        assert digest_prompts(one) == digest_prompts(iter(one))
        others = [
            one[::-1],
            one[:1],
            [Prompt("a", harmful=False), Prompt("b")],
            [Prompt("a"), Prompt("b")],
            [Prompt("a", harmful=True), Prompt("c")],
            [Prompt("a", harmful=True), Prompt("b", history=(Message("user", "x"),))],
            [Prompt("ab", harmful=True)],
        ]
        digests = {digest_prompts(some) for some in (one, *others)}
        assert len(digests) == 1 + len(others)

    def test_names_do_not_count(self):
        assert digest_prompts([Prompt("a", id="1")]) == digest_prompts([Prompt("a", source="x")])
