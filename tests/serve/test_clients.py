"""Other people's packages as clients, in an environment of their own: ``make clients`` makes it."""

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from latentguard.benchmark.figures import measure
from latentguard.benchmark.run import guard_readings
from latentguard.data.builtin import load_contrast
from serve.running import SOURCE, flagged, get, offline, passed, post, running

SCRIPTS = Path(__file__).parent / "clients"
PYTHON = SOURCE.parent / ".venv-clients/bin/python"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SOURCE), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
MASTER = "sk-" + "0f" * 32
"""The proxy starts with no weaker one."""

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="needs 'make clients'")


def ran(script, **asked):
    """What a script prints, run by the clients' own Python."""
    done = subprocess.run(
        [PYTHON, SCRIPTS / script],
        check=False,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_any_guardrail(service):
    texts = list(offline())[:8]
    found = ran("guardrail.py", url=service, texts=texts)
    flags = [offline()[text].flagged for text in texts]
    assert True in flags and False in flags
    assert found == [[not flag, ["illicit"] if flag else []] for flag in flags]


REFUSAL = "I'm sorry, but I can't help with that."
NO_VERDICT = "The guard gave no verdict"


def test_any_guardrail_interface(service):
    texts = list(offline())[:8]
    found = ran("guardrail_provider.py", url=service, texts=texts)
    expected = [offline()[text] for text in texts]
    assert found["valid"] == [not verdict.flagged for verdict in expected]
    assert found["scores"] == pytest.approx([v.probability for v in expected], abs=1e-4)
    assert found["alone"] is found["valid"][0]
    assert found["chat"] is False
    assert found["json"]
    assert found["latency"]
    assert NO_VERDICT in found["error"]


def test_langchain(service):
    """A flagged prompt or tool result never reaches the model, nor anything without a verdict."""
    found = ran(
        "langchain_agent.py", url=service, harmless=passed(), harmful=flagged(), result=flagged()
    )
    assert found["harmless"] == found["fine_later"] == "fine"
    assert found["harmful"] == found["later"] == found["tool"] == REFUSAL
    assert found["note"] is True
    assert NO_VERDICT in found["error"]


def test_llama_index(service):
    found = ran("llama_index_engine.py", url=service, harmless=passed(), harmful=flagged())
    assert found["harmless"]
    assert found["harmful"] == found["complete"] == REFUSAL
    assert found["stream"] == found["stream_chat"] == [REFUSAL]
    later = found["asynchronous"]
    assert later["achat"] == later["acomplete"] == later["astream_chat"] == REFUSAL
    assert later["fine"] == passed()
    assert found["nodes"] == [passed(), " "]
    assert "block of type image" in found["image"]
    assert NO_VERDICT in found["away"]


@pytest.mark.parametrize("key", [None, "secret"])
def test_inspect(tmp_path, key):
    texts = list(offline())[:6]
    with running(keys=[key] if key else ()) as url:
        log = ran("evaluation.py", url=url, key=key, texts=texts, folder=str(tmp_path))
    assert log["status"] == "success", log["error"]
    expected = [offline()[text] for text in texts]
    assert log["values"] == [float(verdict.flagged) for verdict in expected]
    for beliefs, verdict in zip(log["beliefs"], expected, strict=True):
        assert beliefs == pytest.approx(verdict.beliefs, abs=1e-4)
    assert log["mean"] == pytest.approx(sum(verdict.flagged for verdict in expected) / 6)


def test_inspect_notes_a_guard_that_is_away(tmp_path):
    with running(keys=["secret"]) as url:
        log = ran("evaluation.py", url=url, key=None, texts=["a"], folder=str(tmp_path))
    assert log["status"] == "error"
    assert "API key" in log["error"]


CONFIG = """
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_key: none, mock_response: hello from the model}}
guardrails:
  - guardrail_name: latentguard
    litellm_params:
      guardrail: {kind}
      mode: pre_call
      api_key: none
      api_base: {base}
      default_on: true
"""


@contextlib.contextmanager
def litellm_proxy(kind, base, folder):
    """The real LiteLLM proxy, with this service as its guardrail."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(kind=kind, base=base))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        where = ["--config", config, "--host", "127.0.0.1", "--port", str(port)]
        child = subprocess.Popen(
            [PYTHON.with_name("litellm"), *where],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=ENVIRONMENT | {"LITELLM_MASTER_KEY": MASTER},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and child.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if get(f"{url}/health/liveliness").status_code == 200:
                        break
                time.sleep(0.3)
            else:
                raise AssertionError((folder / "log").read_text()[-2000:])
            yield url
        finally:
            child.terminate()
            child.wait(20)


@pytest.mark.parametrize(
    ("kind", "path", "said"),
    [
        ("openai_moderation", "/v1", "illicit"),
        ("generic_guardrail_api", "", "The guard blocks this request"),
    ],
)
def test_litellm_proxy(kind, path, said, service, tmp_path):
    with litellm_proxy(kind, f"{service}{path}", tmp_path) as url:

        def ask(text):
            body = dict(model="mock", messages=[{"role": "user", "content": text}])
            headers = {"authorization": f"Bearer {MASTER}"}
            return post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)

        fine, bad = ask(passed()), ask(flagged())
    assert fine.json()["choices"][0]["message"]["content"] == "hello from the model"
    assert bad.status_code == 400
    assert said in bad.text


class TestHarnesses:
    """Independent harnesses find the figures of ``latentguard benchmark``."""

    @pytest.fixture
    def rows(self):
        return [dict(text=p.text, harmful=p.harmful) for p in load_contrast("test")[:40]]

    @pytest.fixture
    def figures(self, rows):
        verdicts = [offline()[row["text"]] for row in rows]
        labels = np.array([row["harmful"] for row in rows])
        return measure(labels, guard_readings(verdicts))

    @pytest.mark.parametrize("aggregation", ["flagged", "max_score"])
    def test_guard_evaluation_harness(self, service, rows, figures, aggregation, tmp_path):
        asked = dict(url=service, rows=rows, folder=str(tmp_path), aggregation=aggregation)
        (values,) = ran("harness_geh.py", **asked)
        assert values["f1"] == pytest.approx(figures.f1.value, abs=0.001)
        assert values["fpr"] == pytest.approx(figures.fpr.value, abs=0.001)
        if aggregation == "max_score":
            assert values["auroc"] == pytest.approx(figures.auroc.value, abs=0.001)

    def test_guardbench(self, service, rows, figures, tmp_path):
        found = ran("harness_guardbench.py", url=service, rows=rows, folder=str(tmp_path))
        assert found["f1"] == pytest.approx(figures.f1.value, abs=0.001)
        assert found["recall"] == pytest.approx(figures.recall.value, abs=0.001)
        assert found["auprc"] == pytest.approx(figures.auprc.value, abs=0.001)
