"""Other people's packages as clients; each is skipped where it is not installed."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest

from serve.running import flagged, get, offline, passed, post, running

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


MASTER = "sk-" + "0f" * 32
"""The proxy starts with no weaker one."""


def test_any_guardrail(service):
    any_guardrail = pytest.importorskip("any_guardrail")
    name = any_guardrail.GuardrailName.OPENAI_MODERATION
    guardrail = any_guardrail.AnyGuardrail.create(name, api_key="none", base_url=f"{service}/v1")
    for text in list(offline())[:8]:
        found = guardrail.validate(text)
        assert found.valid == (not offline()[text].flagged)
        triggered = [category.name for category in found.categories if category.triggered]
        assert triggered == ([] if found.valid else ["illicit"])


def replies(text):
    """A solver that needs no model: Inspect would fetch a tokenizer to count tokens."""
    from inspect_ai.model import ChatMessageAssistant
    from inspect_ai.solver import solver

    @solver
    def reply():
        async def solve(state, generate):
            state.messages.append(ChatMessageAssistant(content=text))
            return state

        return solve

    return reply()


@pytest.mark.parametrize("key", [None, "secret"])
def test_inspect(tmp_path, key):
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import get_model

    from latentguard.integrations.inspect import belief

    texts = list(offline())[:6]
    with running(keys=[key] if key else ()) as url:
        task = inspect_ai.Task(
            dataset=[Sample(input=text, target="none") for text in texts],
            solver=replies("Certainly."),
            scorer=belief(url, key=key),
        )
        (log,) = inspect_ai.eval(
            task, model=get_model("mockllm/model"), log_dir=str(tmp_path), display="none"
        )
    assert log.status == "success", log.error
    expected = [offline()[text] for text in texts]
    found = [sample.scores["belief"] for sample in log.samples]
    assert [score.value for score in found] == [float(verdict.flagged) for verdict in expected]
    for score, verdict in zip(found, expected, strict=True):
        assert score.metadata["beliefs"] == pytest.approx(verdict.beliefs, abs=1e-4)
    share = sum(verdict.flagged for verdict in expected) / len(expected)
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(share)


def test_inspect_notes_a_guard_that_is_away(tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample

    from latentguard.integrations.inspect import belief

    with running(keys=["secret"]) as url:
        task = inspect_ai.Task(
            dataset=[Sample(input="a", target="b")], solver=replies("No."), scorer=belief(url)
        )
        (log,) = inspect_ai.eval(task, model="mockllm/model", log_dir=str(tmp_path), display="none")
    assert log.status == "error"
    assert "API key" in log.error.message


@contextlib.contextmanager
def litellm_proxy(service, folder):
    """The real LiteLLM proxy, with this service as its moderation guardrail."""
    config = folder / "config.yaml"
    config.write_text(f"""
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_key: none, mock_response: hello from the model}}
guardrails:
  - guardrail_name: latentguard
    litellm_params:
      guardrail: openai_moderation
      mode: pre_call
      api_key: none
      api_base: {service}/v1
      default_on: true
""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from litellm.proxy.proxy_cli import run_server; run_server()"
    arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": MASTER},
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


def test_litellm_proxy(service, tmp_path):
    if importlib.util.find_spec("litellm") is None:  # importing it asks the network
        pytest.skip("needs litellm[proxy]")
    with litellm_proxy(service, tmp_path) as url:

        def ask(text):
            body = dict(model="mock", messages=[{"role": "user", "content": text}])
            headers = {"authorization": f"Bearer {MASTER}"}
            return post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)

        fine, bad = ask(passed()), ask(flagged())
    assert fine.json()["choices"][0]["message"]["content"] == "hello from the model"
    assert bad.status_code == 400
    assert "illicit" in bad.text
