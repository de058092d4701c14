"""The verbs ``data list``, ``data fetch`` and ``data import-released``, with a mirror folder."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.tiny_files import rows, written
from latentguard.data.public_sets import PUBLIC_SETS
from latentguard.files import exclusive_lock


@pytest.fixture
def mirror(tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    written(folder / "advbench.jsonl", rows(520, "sly", "harmful"))
    written(folder / "jbb.jsonl", rows(3, "sly", "harmful") + rows(3, "kind", "harmless"))
    return folder


class TestFetch:
    def test_digest_licence_and_count_are_printed_and_kept(self, lg, mirror, tmp_path):
        out = tmp_path / "data"
        words = ["data", "fetch", "--out", out, "--mirror", mirror]
        code, printed, err = lg(*words, "--only", "advbench", "--only", "jbb")
        assert code == 0, err
        advbench, jbb = printed.splitlines()
        assert advbench.startswith("advbench\t520 rows\tMIT\tsha256 ")
        assert jbb.startswith("jbb\t6 rows (expected 200)\tMIT\t")
        record = json.loads((out / "sources.json").read_text())
        assert advbench.endswith(record["advbench"]["sha256"])
        names = {"advbench.jsonl", "jbb.jsonl", "sources.json"}
        assert {path.name for path in out.iterdir()} == names

    def test_a_set_that_is_missing_does_not_stop_the_others(self, lg, mirror, tmp_path):
        code, printed, err = lg("data", "fetch", "--out", tmp_path / "d", "--mirror", mirror)
        assert code == 1
        assert len(printed.splitlines()) == 2
        assert "toxicchat: " in err
        last = err.splitlines()[-1]
        missing = len(PUBLIC_SETS) - 2
        assert last.startswith(f"Error: {missing} of {len(PUBLIC_SETS)} sets are missing: ")

    def test_without_the_hub_each_set_says_why(self, lg, tmp_path):
        code, _, err = lg("data", "fetch", "--out", tmp_path / "d")
        assert code == 1
        assert "sorry_bench: " in err and "It is gated: accept its terms at" in err
        assert "dsn_suffixes is not on the Hub" in err
        assert not (tmp_path / "d").exists()

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--only", "advbenc"], "There is no public set 'advbenc'; expected advbench, "),
            (["--mirror", "nowhere"], "--mirror should be a folder; found nothing at nowhere"),
        ],
    )
    def test_wrong_names(self, fails, tmp_path, words, reason):
        assert reason in fails("data", "fetch", "--out", tmp_path / "d", *words)

    def test_two_runs_meet_a_lock(self, fails, mirror, tmp_path):
        out = tmp_path / "data"
        out.mkdir()
        with exclusive_lock(out / ".lock", output=out):
            words = ["data", "fetch", "--out", out, "--mirror", mirror]
            assert "Another run (process " in fails(*words)


class TestList:
    def test_every_set_with_what_is_there(self, lg, mirror, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "250")
        out = tmp_path / "data"
        lg("data", "fetch", "--out", out, "--mirror", mirror)
        (out / "jbb.jsonl").write_text('{"text": "changed"}\n')
        (out / "toxicchat_third.jsonl").write_text("")
        code, printed, _ = lg("data", "list", "--data-dir", out)
        assert code == 0
        printed, _, others = printed.partition("Also read, if you put them there:\n")
        assert others.splitlines()[:2] == [
            "  jailbreaks.jsonl, for jailbreaks (missing)",
            "  toxicchat_third.jsonl, for toxicchat (there)",
        ]
        line = {text.split()[0]: text for text in printed.splitlines() if ".jsonl" in text}
        assert set(line) == {f"{one.name}.jsonl" for one in PUBLIC_SETS}
        assert "520 (there)" in line["advbench.jsonl"]
        assert "1 (changed)" in line["jbb.jsonl"]
        assert "missing" in line["xstest.jsonl"]
        assert "(gated)" in line["sorry_bench.jsonl"]
        assert "CC BY-NC 4.0" in line["toxicchat.jsonl"]
        assert "jailbreaks" in line["dsn_suffixes.jsonl"]
        assert f"latentguard data fetch --out {out}" in others


class TestImportReleased:
    def test_arrays_become_safetensors(self, lg, tmp_path):
        array = np.arange(8, dtype=np.float16).reshape(2, 4)
        torch.save(array, tmp_path / "qwen-dir-hf.pt")
        out = tmp_path / "released.safetensors"
        code, printed, err = lg(
            "data", "import-released", tmp_path / "qwen-dir-hf.pt", "--out", out
        )
        assert (code, printed) == (0, "qwen-dir-hf\t[2, 4]\n")
        assert f"Written to {out}." in err
        assert np.array_equal(load_file(out)["qwen-dir-hf"].numpy(), array)

    def test_a_malicious_file_is_refused(self, fails, tmp_path):
        class Runs:
            def __reduce__(self):
                return open, (str(tmp_path / "ran"), "w")

        torch.save({"a": np.ones(3), "b": Runs()}, tmp_path / "bad.pt")
        words = [
            "data",
            "import-released",
            tmp_path / "bad.pt",
            "--out",
            tmp_path / "o.safetensors",
        ]
        assert "cannot be read safely: it names " in fails(*words)
        assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]

    def test_a_file_that_is_there_stays(self, fails, tmp_path):
        torch.save(np.ones(3), tmp_path / "a.pt")
        (tmp_path / "o.safetensors").write_text("mine")
        words = ["data", "import-released", tmp_path / "a.pt", "--out", tmp_path / "o.safetensors"]
        assert "would be overwritten" in fails(*words)
        assert (tmp_path / "o.safetensors").read_text() == "mine"
