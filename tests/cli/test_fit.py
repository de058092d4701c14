"""The verb ``fit``, on a tiny random model."""

import pytest

from cli.tiny_files import record, rows, written
from latentguard.data.builtin import DEFAULT_ROWS, load_training_rows
from latentguard.errors import PromptError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from models.architectures import WIDE, chat_model


class TestFit:
    def test_files_that_carry_labels(self, lg, model, files, tmp_path):
        out = tmp_path / "new" / "g"
        both = ["--harmful", files["mixed"], "--harmless", files["mixed"]]
        code, stdout, err = lg(
            "fit", "--model", model, "--out", out, *both, "--harmless", files["harmless"]
        )
        assert (code, stdout) == (0, "")
        made = record(out)
        assert (made["fitted"]["harmful"], made["fitted"]["harmless"]) == (15, 6 + 14)
        assert made["fingerprint"]["model"] == str(model)
        assert made["probe"]["kind"] == "linear"
        assert made["reading"]["name"] == "pooled"
        assert f"latentguard calibrate {out}" in err
        assert "Warning" not in err.replace("Warning: The length", "")

    def test_the_papers_guard_on_the_built_in_set(self, lg, model, tmp_path):
        """On a part of it, which is read in a tenth of the time."""
        some = load_training_rows(1000)
        rule = ["--reading", "t_inst", "--probe", "centroid", "--rows", "1000"]
        code, _, err = lg("fit", "--model", model, "--out", tmp_path / "g", "--contrast", *rule)
        made = record(tmp_path / "g")
        assert code == 0
        sides = [bool(p.harmful) for p in some]
        assert made["fitted"]["harmful"] == sum(sides)
        assert made["fitted"]["harmless"] == len(sides) - sum(sides)
        assert made["fitted"]["sources"] == ["traffic"]
        assert (made["reading"]["name"], made["probe"]["kind"]) == ("t_inst", "centroid")
        assert made["probe"]["layers"] == [1, 2, 3, 4]
        assert "Warning" not in err

    @pytest.mark.parametrize(
        ("words", "count"), [([], DEFAULT_ROWS), (["--rows", "50"], 50), (["--all-rows"], None)]
    )
    def test_how_many_built_in_rows_are_read(self, lg, monkeypatch, tmp_path, words, count):
        asked = []

        def load(count):
            asked.append(count)
            raise PromptError("reached")

        monkeypatch.setattr("latentguard.cli.fit.load_training_rows", load)
        assert "reached" in lg("fit", "--out", tmp_path / "g", *words)[2]
        assert asked == [count]

    def test_quantised_weights_and_where_they_lie(self, lg, tokenizer, files, tmp_path):
        """What the guard says of its model is how ``score`` loads it."""
        pytest.importorskip("bitsandbytes")
        model, out = tmp_path / "wide", tmp_path / "g"
        chat_model("llama", tokenizer, **WIDE).model.save_pretrained(model)
        tokenizer.save_pretrained(model)
        train = ("--harmful", files["mixed"], "--harmless", files["harmless"])
        code, _, err = lg("fit", "--model", model, "--out", out, *train, "--quantize", "nf4")
        assert code == 0, err
        assert record(out)["fingerprint"]["dtype"] == "float32/nf4"
        code, verdicts, err = lg("score", out, files["few"], "--device-map", "auto")
        assert code == 0, err
        assert len(verdicts.splitlines()) == 20

    def test_a_killed_fit_goes_on_from_the_states_that_it_captured(
        self, lg, model, files, tmp_path, monkeypatch, cache
    ):
        words = ["fit", "--model", model, "--harmful", files["mixed"]]
        words += ["--harmless", files["harmless"], "--out"]
        assert lg(*words, tmp_path / "whole")[0] == 0
        assert not any((cache / "captures").iterdir())

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LatentGuard, "from_states", interrupted)
            code, _, err = lg(*words, tmp_path / "g")
        assert code == 130
        assert f"States are kept in {cache / 'captures'}. Run the same command again" in err
        assert any((cache / "captures").iterdir())
        read, capture = [], ChatModel.capture

        def counted(self, prompts, **how):
            rows = list(prompts)
            read.append(len(rows))
            return capture(self, rows, **how)

        monkeypatch.setattr(ChatModel, "capture", counted)
        assert lg(*words, tmp_path / "g")[0] == 0
        assert read[0] == 0  # the rest are canaries
        assert not any((cache / "captures").iterdir())
        for name in ("guard.json", "guard.safetensors"):
            one, other = (tmp_path / folder / name for folder in ("g", "whole"))
            assert one.read_bytes() == other.read_bytes()

    def test_it_warns_of_form(self, lg, model, tmp_path):
        sides = []
        for side, ending in (("harmful", "."), ("harmless", "?")):
            asked = [dict(text=f"item {n}{ending}") for n in range(12)]
            sides += [f"--{side}", written(tmp_path / f"{side}.jsonl", asked)]
        code, _, err = lg("fit", "--model", model, "--out", tmp_path / "g", *sides)
        assert code == 0
        assert "Warning: The ending of a prompt alone tells the label apart (1.00" in err

    def test_another_column(self, lg, fails, model, tmp_path):
        sides = []
        for word in ("sly", "kind"):
            asked = [dict(goal=row["text"]) for row in rows(12, word)]
            side = "harmful" if word == "sly" else "harmless"
            sides += [f"--{side}", written(tmp_path / f"{word}.jsonl", asked)]
        words = ["fit", "--model", model, "--out", tmp_path / "g", *sides]
        assert "line 1: no column 'text'; columns found: goal" in fails(*words)
        assert lg(*words, "--text-column", "goal")[0] == 0

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--harmful", "nothing.jsonl"], "nothing.jsonl cannot be read: No such file"),
            (["--harmful", "{harmless}"], "was given for harmful prompts and holds none"),
            (["--harmful", "{mixed}"], "0 harmless"),
            (["--harmful", "{mixed}", "--harmless", "{mixed}"], "at least 10 prompts of each"),
            (["--contrast", "--reading", "t_last"], "no reading 't_last'"),
            (["--contrast", "--dtype", "float99"], "float99"),
        ],
    )
    def test_errors(self, fails, model, files, tmp_path, words, reason):
        words = [word.format(**files) for word in words]
        assert reason in fails("fit", "--model", model, "--out", tmp_path / "g", *words)
        assert not (tmp_path / "g").exists()

    def test_no_such_model(self, fails, tmp_path):
        words = ["fit", "--contrast", "--model", tmp_path / "none", "--out", tmp_path / "g"]
        assert "could not be loaded as a chat model" in fails(*words)

    def test_a_place_that_cannot_be_written(self, fails, model, files, tmp_path):
        (tmp_path / "file").write_text("mine")
        words = ["--harmful", files["mixed"], "--harmless", files["harmless"], "--model", model]
        assert "file" in fails("fit", *words, "--out", tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
