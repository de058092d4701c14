"""A guard on disk: every way in which it can be damaged is an error, and a pinned one loads."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load, save

from data import make_guard
from fake_backend import FakeBackend, labelled, with_refusals
from guard_files import edit_guard
from latentguard.errors import GuardError
from latentguard.guard.artifact import CARD_FILE, JSON_FILE, SCHEMA, TENSOR_FILE
from latentguard.guard.latent_guard import LatentGuard

PINNED = make_guard.FOLDER


@pytest.fixture(scope="module")
def guard():
    backend = FakeBackend()
    return LatentGuard.fit(backend, with_refusals(labelled(30)), reading="t_inst")


@pytest.fixture
def folder(guard, tmp_path):
    guard.save(tmp_path / "g")
    return tmp_path / "g"


def swap(folder, packed):
    """Put other tensors in, with the digest that fits them."""
    (folder / TENSOR_FILE).write_bytes(packed)
    edit_guard(folder, lambda r: r.update(tensors_sha256=hashlib.sha256(packed).hexdigest()))


class TestFiles:
    def test_what_is_written(self, guard, folder):
        names = {file.name for file in folder.iterdir()}
        assert names == {JSON_FILE, TENSOR_FILE, CARD_FILE}
        record = json.loads((folder / JSON_FILE).read_text())
        assert record["schema"] == SCHEMA == 3
        assert record["fingerprint"] == asdict(guard.fingerprint)
        assert set(load((folder / TENSOR_FILE).read_bytes())) == {
            "weight",
            "training_digests",
            *(f"{axis}.{pole}" for axis in ("harmful", "refuse") for pole in POLES),
            *("categories.weight", "categories.bias"),
        }

    def test_the_card(self, folder):
        card = (folder / CARD_FILE).read_text()
        assert card.startswith("---\nlibrary_name: latentguard\n")
        assert "\n# Latent guard for fake\n" in card
        for words in ("`t_inst`", "`linear`", "30 harmful and 30 harmless", "nothing is promised"):
            assert words in card
        assert "aaaaaaaaaaaa" in card

    def test_saving_again_replaces_it(self, guard, folder):
        other = LatentGuard.fit(FakeBackend(), labelled(20), probe="centroid")
        other.save(folder)
        assert LatentGuard.load(folder).digest == other.digest

    def test_a_save_that_is_cut_short_leaves_no_mixture(self, guard, folder, monkeypatch):
        other = LatentGuard.fit(FakeBackend(), labelled(20))
        rename = Path.replace

        def cut(self, target):
            if Path(target).name == JSON_FILE:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            other.save(folder)
        with pytest.raises(GuardError, match="belongs to another guard"):
            LatentGuard.load(folder)

    def test_a_full_disk_leaves_the_guard_as_it_was(self, guard, folder, monkeypatch):
        other, before = (
            LatentGuard.fit(FakeBackend(), labelled(20)),
            LatentGuard.load(folder).digest,
        )
        calls = iter([True, False])

        def full(number):
            if not next(calls):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            other.save(folder)
        assert LatentGuard.load(folder).digest == before

    def test_a_guard_of_unknown_making(self, guard, tmp_path):
        replace(guard, fitted=None).save(tmp_path)
        assert LatentGuard.load(tmp_path).fitted is None
        assert "an unknown number of harmful" in (tmp_path / CARD_FILE).read_text()

    def test_new_folders_are_made(self, guard, tmp_path):
        guard.save(tmp_path / "a" / "b")
        assert LatentGuard.load(str(tmp_path / "a" / "b")).digest == guard.digest


POLES = ("positive", "negative")


class TestDamage:
    @pytest.mark.parametrize("name", [JSON_FILE, TENSOR_FILE])
    def test_a_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(GuardError, match=f"{name} cannot be read: No such file"):
            LatentGuard.load(folder)

    def test_no_folder(self, tmp_path):
        with pytest.raises(GuardError, match="latentguard fit"):
            LatentGuard.load(tmp_path / "nothing")

    def test_a_file_instead_of_a_folder(self, folder):
        with pytest.raises(GuardError, match="cannot be read"):
            LatentGuard.load(folder / JSON_FILE)

    def test_truncated_json_at_every_length(self, folder):
        text = (folder / JSON_FILE).read_bytes()
        for end in range(0, len(text), max(1, len(text) // 97)):
            (folder / JSON_FILE).write_bytes(text[:end])
            with pytest.raises(GuardError, match="is not JSON"):
                LatentGuard.load(folder)

    @pytest.mark.parametrize("content", [b"\xff\xfe{", b"{}", b"[]", b"3", b"null", b'"a"'])
    def test_other_content(self, folder, content):
        (folder / JSON_FILE).write_bytes(content)
        with pytest.raises(GuardError, match=r"is not JSON|has schema .* expected 3"):
            LatentGuard.load(folder)

    @pytest.mark.parametrize("schema", [0, 2, 4, "3", None])
    def test_another_schema(self, folder, schema):
        edit_guard(folder, lambda r: r.update(schema=schema))
        with pytest.raises(GuardError, match=f"has schema {schema!r}, expected 3"):
            LatentGuard.load(folder)

    def test_what_a_newer_version_added(self, folder):
        edit_guard(folder, lambda r: r.update(colour="red"))
        with pytest.raises(GuardError, match=r"colour, which this version .* does not know"):
            LatentGuard.load(folder)

    def test_truncated_or_flipped_tensors(self, folder):
        packed = (folder / TENSOR_FILE).read_bytes()
        for content in (packed[:-1], b"", packed[:-1] + bytes([packed[-1] ^ 1])):
            (folder / TENSOR_FILE).write_bytes(content)
            with pytest.raises(GuardError, match="damaged or belongs to another guard"):
                LatentGuard.load(folder)

    def test_tensors_of_another_guard(self, folder, tmp_path):
        LatentGuard.fit(FakeBackend(), labelled(20)).save(tmp_path / "other")
        (folder / TENSOR_FILE).write_bytes((tmp_path / "other" / TENSOR_FILE).read_bytes())
        with pytest.raises(GuardError, match="belongs to another guard"):
            LatentGuard.load(folder)

    @pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08" + bytes(7) + b"{}      "])
    def test_tensors_that_are_none(self, folder, content):
        swap(folder, content)
        with pytest.raises(GuardError):
            LatentGuard.load(folder)

    def test_each_key_is_needed(self, folder):
        whole = (folder / JSON_FILE).read_text()
        for key in set(json.loads(whole)) - {"content_sha256"}:  # guards of before have none
            edit_guard(folder, lambda r, key=key: r.pop(key))
            with pytest.raises(GuardError):
                LatentGuard.load(folder)
            (folder / JSON_FILE).write_text(whole)
        LatentGuard.load(folder)

    @pytest.mark.parametrize(
        "path",
        [
            ("fingerprint", "weights"),
            ("reading", "positions"),
            ("reading", "name"),
            ("probe", "kind"),
            ("probe", "layers"),
            ("probe", "bias"),
            ("axes", 0, "name"),
            ("axes", 0, "counts"),
            ("canaries", 0, "score"),
            ("platt", 0),
            ("platt", 1),
        ],
    )
    def test_each_part_of_it_is_needed(self, folder, path):
        def remove(record):
            for key in path[:-1]:
                record = record[key]
            del record[path[-1]]

        edit_guard(folder, remove)
        with pytest.raises(GuardError, match="holds a damaged guard"):
            LatentGuard.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            dict(threshold=None),
            dict(threshold="high"),
            dict(threshold=float("nan")),  # would flag nothing, and say nothing of it
            dict(threshold=float("inf")),
            dict(platt=[float("nan"), 0.0]),
            dict(platt=None),
            dict(spread=float("nan")),  # would let any canary pass
            dict(spread="wide"),
            dict(spread=0.0),
            dict(spread=1e308),
            dict(axes=None),
            dict(canaries=None),
            dict(canaries=[{"text": "a", "score": float("nan")}]),
            dict(probe={"kind": "tree", "layers": [2, 3], "bias": 0.0}),
            dict(probe={"kind": "linear", "layers": [2], "bias": 0.0}),
            dict(probe={"kind": "linear", "layers": [], "bias": 0.0}),
            dict(probe={"kind": "linear", "layers": [2, 3], "bias": float("nan")}),
            dict(probe=3),
            dict(reading={"name": "t_inst", "positions": ["t_inst", "t_post"]}),
            dict(reading=[]),
            dict(fingerprint={"model": "x"}),
            dict(fingerprint=None),
            dict(bound={"n": 3}),
            dict(bound=[1]),
        ],
        ids=str,
    )
    def test_values_that_cannot_be(self, folder, change):
        edit_guard(folder, lambda r: r.update(change))
        with pytest.raises(GuardError, match="holds a damaged guard"):
            LatentGuard.load(folder)

    @pytest.mark.parametrize("name", ["weight", "harmful.positive", "refuse.negative"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda t: t[:1],
            lambda t: t[:, :3],
            lambda t: t.flatten(),
            lambda t: t[None],
            lambda t: t * float("nan"),
            lambda t: None,
        ],
        ids=["rows", "width", "flat", "deep", "nan", "none"],
    )
    def test_wrong_tensors(self, folder, name, damage):
        tensors = load((folder / TENSOR_FILE).read_bytes())
        tensors[name] = damage(tensors[name])
        kept = {k: v.contiguous() for k, v in tensors.items() if v is not None}
        swap(folder, save(kept))
        with pytest.raises(GuardError, match="holds a damaged guard"):
            LatentGuard.load(folder)


UNDEFINED_BOUND = dict(
    threshold=0.1, max_fpr=0.05, upper=float("nan"), confidence=0.95, observed=1, n=100
)


def make_high(record):
    record["threshold"] = 1e308


def drop_canaries(record):
    record["canaries"] = []


def lower_below_a_canary(record):
    record["threshold"] = min(canary["score"] for canary in record["canaries"]) - 0.1


class TestIntegrity:
    @pytest.mark.parametrize("change", [make_high, drop_canaries, lower_below_a_canary])
    def test_a_change_of_the_json_is_noticed_by_its_digest(self, folder, change):
        edit_guard(folder, change, seal=False)
        with pytest.raises(GuardError, match=r"was changed after it was written.*Restore the file"):
            LatentGuard.load(folder)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (make_high, r"a threshold of 1e\+308 is out of the range of scores"),
            (lambda r: r.update(threshold=-1e6), ".* is out of the range of scores"),
            (lambda r: r.update(threshold=float("inf")), "a number is not finite"),
            (lambda r: r.update(bound=UNDEFINED_BOUND), "a bound is not finite"),
            (drop_canaries, "there are no canaries"),
            (lower_below_a_canary, "the decision on canary . is not that of the threshold"),
        ],
    )
    def test_what_cannot_be_is_refused_whatever_the_digest(self, folder, change, reason):
        edit_guard(folder, change)
        with pytest.raises(GuardError, match=f"holds a damaged guard .{reason}"):
            LatentGuard.load(folder)

    def test_spaces_and_order_do_not_count(self, folder):
        record = json.loads((folder / JSON_FILE).read_text())
        (folder / JSON_FILE).write_text(json.dumps(dict(reversed(record.items()))))
        LatentGuard.load(folder)

    def test_a_guard_of_before_has_no_digest(self, folder):
        edit_guard(folder, lambda record: record.pop("content_sha256"))
        LatentGuard.load(folder)


class TestPinnedGuard:
    """A guard that was saved by this schema's first version, with every optional field."""

    def test_it_loads_and_reproduces_its_verdicts(self):
        guard = LatentGuard.load(PINNED)
        wanted = json.loads((PINNED / "verdicts.json").read_text())
        verdicts = guard.scan(FakeBackend(signal=0.5), make_guard.PROMPTS)
        for verdict, record in zip(verdicts, wanted, strict=True):
            numbers = ("score", "probability", "beliefs", "category_scores")
            for name in numbers:
                assert getattr(verdict, name) == pytest.approx(record.pop(name), abs=1e-6)
            evidence = record.pop("evidence")
            assert [e.score for e in verdict.evidence] == pytest.approx(
                [e.pop("score") for e in evidence], abs=1e-6
            )
            assert [(e.message, e.start, e.end) for e in verdict.evidence] == [
                tuple(e.values()) for e in evidence
            ]
            found = verdict.to_dict()
            assert record == {name: found[name] for name in record}

    def test_it_shows_each_kind_of_verdict(self):
        verdicts = json.loads((PINNED / "verdicts.json").read_text())
        assert {v["decision"] for v in verdicts} == {"allow", "review", "block"}
        assert any(v["evidence"] for v in verdicts) and any(v["obfuscations"] for v in verdicts)

    def test_saving_it_again_changes_nothing(self, tmp_path):
        guard = LatentGuard.load(PINNED)
        guard.save(tmp_path)
        assert LatentGuard.load(tmp_path).digest == guard.digest
        assert (tmp_path / TENSOR_FILE).read_bytes() == (PINNED / TENSOR_FILE).read_bytes()
        record = json.loads((tmp_path / JSON_FILE).read_text())
        assert record.pop("content_sha256")  # later versions write these, too
        for canary in record["canaries"]:
            assert canary.pop("flagged") in (True, False)
        assert record == json.loads((PINNED / JSON_FILE).read_text())
