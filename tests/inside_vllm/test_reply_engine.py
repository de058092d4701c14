"""Tokens that a real engine generates score as they do on transformers, each of them once."""

from dataclasses import replace

import pytest
import torch

from inside_vllm import tiny
from latentguard.errors import GuardError
from latentguard.guard.reply_fitting import calibrate_replies
from latentguard.integrations.vllm import parity
from latentguard.integrations.vllm.reply_tokens import TokenScoreLog
from latentguard.integrations.vllm.score_request import TokenScores, score_request
from latentguard.models.reply_reading import score_reply_tokens
from latentguard.prompts import Prompt, Reply

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

PROMPTS = [Prompt(text, id=str(n)) for n, text in enumerate([*tiny.TEXTS[:28], *tiny.LONG])]
LENGTH = 48


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    tiny.save_model("llama", folder / "model")
    guard, hf = tiny.fit_both(str(folder / "model"), folder / "guard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        model = tiny.start(folder / "guard", num_gpu_blocks_override=72, disable_log_stats=False)
    yield guard, hf, model
    tiny.stop(model)


def generate(model, prompts, length=LENGTH, **how):
    """Replies with the scores that the engine posted while it wrote them."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    layouts = model.chat(prompts)
    positions = model.columns.positions
    requests = [score_request(lay, positions, model._channel, tail=0) for lay in layouts]
    sampling = [
        SamplingParams(
            max_tokens=length,
            ignore_eos=True,
            extra_args={"kv_transfer_params": request.params},
            **how,
        )
        for request in requests
    ]
    tokens = [TokensPrompt(prompt_token_ids=list(lay.ids)) for lay in layouts]
    logs = {request.key: TokenScoreLog.of(1) for request in requests}
    with model._channel.reading() as posted:
        outputs = model.engine.generate(tokens, sampling, use_tqdm=False)
    for part in posted:
        if isinstance(part, TokenScores):
            logs[part.key].add(part)
    replies = [
        Reply(prompt, "", ids=tuple(out.outputs[0].token_ids))
        for prompt, out in zip(prompts, outputs, strict=True)
    ]
    return replies, list(logs.values())


def require_equal(guard, hf, model, replies, logs):
    probe = guard.require_reply_probe().probe
    there = [scores for _, scores in score_reply_tokens(hf, replies, probe.layers, probe.weight)]
    here = [scores for _, scores in model.reply_scores(replies, probe.layers, probe.weight)]
    for reply, log, on_hf, in_vllm in zip(replies, logs, there, here, strict=True):
        own = torch.tensor(log.scores[0])
        assert not log.is_lost
        assert len(own) == len(reply.ids) - 1  # the last token was sampled, not computed
        size = max(1.0, float(on_hf.abs().max()))
        assert torch.allclose(own, on_hf[: len(own)], atol=1e-5 * size, rtol=0)
        assert torch.allclose(own, in_vllm[: len(own)], atol=1e-5 * size, rtol=0)
        assert torch.allclose(in_vllm, on_hf, atol=1e-5 * size, rtol=0)


def test_tokens_score_as_on_transformers_alone_and_together(engine):
    guard, hf, model = engine
    for prompts in ([PROMPTS[0]], [PROMPTS[-1]], PROMPTS[:8]):
        model.engine.reset_prefix_cache()
        require_equal(guard, hf, model, *generate(model, prompts, temperature=0.0))
        require_equal(guard, hf, model, *generate(model, prompts, temperature=0.0))  # cached


def test_through_preemption_and_chunks_each_token_is_read_once(engine):
    """All at once in a cache that is too small for them; long prompts take several steps."""
    guard, hf, model = engine
    model.engine.reset_prefix_cache()
    before = parity.preemptions(model)
    replies, logs = generate(model, PROMPTS, temperature=1.0)
    assert parity.preemptions(model) > before
    require_equal(guard, hf, model, replies, logs)


def test_a_guard_judges_and_calibrates_replies_inside(engine):
    guard, hf, model = engine
    replies, _ = generate(model, PROMPTS[:24], length=24, temperature=1.0)
    ours, theirs = (list(guard.scan_replies(backend, replies)) for backend in (model, hf))
    for one, other in zip(ours, theirs, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5 * max(1.0, abs(other.score)))
        assert (one.flagged_at, one.tokens) == (other.flagged_at, other.tokens)
    new = calibrate_replies(model, guard, replies, max_fpr=0.2)
    assert new.replies.bound is not None
    probe = replace(guard.replies.probe, weight=guard.replies.probe.weight * 2)
    other = replace(guard, replies=replace(guard.replies, probe=probe))
    with pytest.raises(GuardError, match="another guard"):
        list(other.scan_replies(model, replies))


def test_with_scoring_off_no_token_has_a_score(engine):
    from latentguard.integrations.vllm import model as inside

    _, _, model = engine
    generate(model, PROMPTS[:8], temperature=0.0)
    guarded = inside.models[-1]
    model.engine.reset_prefix_cache()
    guarded.set_aux_hidden_state_layers(())
    try:
        _, logs = generate(model, PROMPTS[:8], temperature=0.0)
    finally:
        guarded.set_aux_hidden_state_layers(guarded._columns.layers)
        model.engine.reset_prefix_cache()
    assert all(log.is_lost for log in logs)
    assert all(score != score for log in logs for score in log.scores[0])
