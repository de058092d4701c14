"""What is refused, with a sentence each; and the arguments of the server."""

from types import SimpleNamespace

import pytest

from inside_vllm.test_judged_replies import judging_guard
from latentguard.errors import GuardError, ModelError
from latentguard.integrations.vllm.__main__ import arguments
from latentguard.integrations.vllm.plugin import register, require_tested
from latentguard.integrations.vllm.unsupported import require_supported
from serve.running import band_guard, tiny_guard
from serve.test_chat_thresholds import with_rate


def config(*, model=None, parallel=None, **more):
    known = dict(architectures=["LlamaForCausalLM"], quantization=None, enable_prompt_embeds=False)
    return SimpleNamespace(
        model_config=SimpleNamespace(**known | (model or {})),
        parallel_config=SimpleNamespace(
            **dict(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)
            | (parallel or {})
        ),
        **dict(
            kv_transfer_config=SimpleNamespace(kv_connector="LatentGuardConnector"),
            speculative_config=None,
            lora_config=None,
        )
        | more,
    )


def test_an_ordinary_engine_is_fine():
    require_supported(config())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(model=dict(architectures=["GemmaForCausalLM"])), "GemmaForCausalLM"),
        (dict(model=dict(quantization="fp8")), "fp8"),
        (dict(model=dict(enable_prompt_embeds=True)), "embeddings"),
        (dict(parallel=dict(tensor_parallel_size=2)), "tensor_parallel_size 2"),
        (dict(parallel=dict(pipeline_parallel_size=2)), "pipeline_parallel_size 2"),
        (dict(parallel=dict(data_parallel_size=4)), "data_parallel_size 4"),
        (dict(parallel=dict(decode_context_parallel_size=2)), "decode_context"),
        (dict(parallel=dict(enable_dbo=True)), "batch overlap"),
        (dict(kv_transfer_config=None), "found None"),
        (dict(kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector")), "NixlConnector"),
        (dict(kv_transfer_config=SimpleNamespace(kv_connector="MultiConnector")), "elsewhere"),
        (dict(speculative_config=object()), "Speculative"),
        (dict(lora_config=object()), "LoRA"),
    ],
)
def test_each_refusal_says_why(changed, reason):
    with pytest.raises(ModelError, match=reason):
        require_supported(config(**changed))


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "dev"])
def test_a_vllm_that_was_never_tested_is_refused(version):
    with pytest.raises(ModelError, match=r"0\.32"):
        require_tested(version)


def test_the_tested_vllm_is_the_one_that_the_extra_names():
    import tomllib
    from pathlib import Path

    require_tested("0.32.0")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["vllm"] == ["vllm>=0.32,<0.33"]


def test_without_a_guard_the_plugin_changes_nothing(monkeypatch):
    monkeypatch.delenv("LATENTGUARD_GUARD", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)  # importing it would fail
    register()


@pytest.fixture
def folder(tmp_path):
    tiny_guard().save(tmp_path)
    return str(tmp_path)


def test_the_arguments_of_the_server(folder):
    words, variables = arguments([folder, "--policy", "annotate", "--port", "1", "--model", folder])
    assert words[:4] == ["--model", folder, "--dtype", "float32"]
    assert words[-2:] == ["--port", "1"]
    assert "GuardMiddleware" in " ".join(words)
    assert variables["LATENTGUARD_GUARD"] == folder
    assert variables["LATENTGUARD_POLICY"] == "annotate"


def test_options_for_replies_reach_the_middleware(tmp_path):
    judging_guard().save(tmp_path)
    words = [str(tmp_path), "--model", str(tmp_path)]
    _, variables = arguments([*words, "--reply-policy", "block", "--hold-tokens", "3"])
    assert variables["LATENTGUARD_REPLY_POLICY"] == "block"
    assert variables["LATENTGUARD_HOLD_TOKENS"] == "3"
    _, variables = arguments(words)
    assert "LATENTGUARD_REPLY_POLICY" not in variables
    assert variables["LATENTGUARD_HOLD_TOKENS"] == "8"
    with pytest.raises(GuardError, match="expected 0 or more"):
        arguments([*words, "--hold-tokens", "-1"])


def test_a_reply_policy_without_a_reply_part_is_refused(folder):
    with pytest.raises(GuardError, match="does not judge replies"):
        arguments([folder, "--reply-policy", "cut"])


@pytest.mark.parametrize(
    "word", ["--kv-transfer-config={}", "--middleware=x.Y", "--kv_transfer_config", "--runner"]
)
def test_options_that_the_guard_sets_are_refused(folder, word):
    with pytest.raises(GuardError, match="set by the guard"):
        arguments([folder, word])


def test_a_guard_without_thresholds_for_chats_starts_no_server(tmp_path):
    with_rate(band_guard(), 1e-6).save(tmp_path / "guard")
    with pytest.raises(GuardError, match="cannot judge chats"):
        arguments([str(tmp_path / "guard")])
