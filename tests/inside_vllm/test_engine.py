"""Scores out of a real engine's prefill equal those on transformers; never a stale one."""

import json
import shutil
from dataclasses import replace

import pytest

from inside_vllm import tiny
from latentguard.errors import GuardError, ModelError, ModelMismatch
from latentguard.guard.chunking import Chunking
from latentguard.integrations.vllm import parity
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

PROMPTS = [Prompt(text, id=str(n)) for n, text in enumerate([*tiny.TEXTS, *tiny.LONG])]
TOLERANCE = 1e-5
"""In the score's unit and, as the unit of a linear probe is arbitrary, in its spread too."""

ROUNDING = 1e-6
"""Eight float32 steps at 1: cosines, so scores of the centroid probe, are not closer than that."""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one import of vLLM, not three


@pytest.fixture(
    scope="module",
    params=[("llama", "attended", "linear", True), ("qwen2", "span", "centroid", False)],
    ids=lambda p: "-".join(map(str, p)),
)
def fitted(request, tmp_path_factory):
    kind, reading, probe, tied = request.param
    folder = tmp_path_factory.mktemp(kind)
    tiny.save_model(kind, folder / "model", tied=tied)
    guard, model = tiny.fit(str(folder / "model"), folder / "guard", reading=reading, probe=probe)
    return guard, list(guard.scan(model, PROMPTS)), folder


@pytest.fixture(scope="module")
def engine(fitted):
    guard, reference, folder = fitted
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        model = tiny.start(folder / "guard", num_gpu_blocks_override=72, disable_log_stats=False)
    yield guard, reference, model
    tiny.stop(model)


def allowed(guard, tolerance=TOLERANCE):
    """The largest difference of a score that rounding may make, in the score's unit."""
    return max(ROUNDING, tolerance * min(1.0, guard.spread))


def close(found, reference, guard, tolerance=TOLERANCE):
    assert len(found) == len(reference)
    for ours, theirs in zip(found, reference, strict=True):
        assert abs(ours.score - theirs.score) <= allowed(guard, tolerance)
        assert ours.beliefs == pytest.approx(theirs.beliefs, abs=tolerance)
        assert ours.flagged == theirs.flagged


@pytest.mark.parametrize("what", ["weights", "template", "tokenizer"])
def test_another_model_is_refused_while_it_loads(fitted, tmp_path, what):
    _, _, folder = fitted
    if what != "weights" and not (folder / "model" / "chat_template.jinja").exists():
        pytest.skip("the template is stored otherwise")
    with pytest.raises((ModelMismatch, ModelError), match=what):
        tiny.start(folder / "guard", source=broken(folder, tmp_path, what))


def test_dummy_weights_are_refused(fitted):
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    _, _, folder = fitted
    with pytest.raises(ModelError, match="No weights were loaded"):
        tiny.start(folder / "guard", load_format="dummy")
    with pytest.raises(ModelError, match="failed to start"):
        tiny.start(folder / "guard")
    ensure_kv_transfer_shutdown()


def test_every_condition_and_preemption(engine):
    guard, reference, model = engine
    found = parity.compare(
        guard, reference, model, PROMPTS, spare=lambda: parity.preemptions(model)
    )
    text = str(parity.table(found).rows)
    assert [d.condition for d in found][:2] == [
        "short, batch 1, uncached",
        "short, batch 1, cached",
    ]
    assert all(d.n for d in found)
    assert all(d.score <= allowed(guard) for d in found), text
    assert all(d.belief <= TOLERANCE and d.flips == 0 for d in found), text
    assert " 0 preemptions" not in text, text


def test_the_guard_is_checked_and_calibrated_inside(engine):
    guard, _, model = engine
    guard.verify_model(model)
    harmless = [p for p in PROMPTS[:40]] * 2
    new = guard.calibrate(model, harmless, max_fpr=0.1)
    assert new.bound is not None
    assert next(iter(new.scan(model, PROMPTS[:2]))).score == pytest.approx(
        next(guard.scan(model, PROMPTS[:1])).score, abs=1e-6
    )
    with pytest.raises(ModelError, match="no states out"):
        model.capture(PROMPTS)
    other = replace(guard, probe=replace(guard.probe, weight=guard.probe.weight * 2))
    with pytest.raises(GuardError, match="another guard"):
        list(other.scan(model, PROMPTS[:1]))


def test_long_and_disguised_prompts_are_read_as_on_transformers(engine, fitted):
    guard, _, model = engine
    asked = [*tiny.LONG, "\u0336".join(tiny.TEXTS[0]), tiny.TEXTS[1]]
    wide = replace(
        guard,
        chunking=Chunking(threshold=1.0, max_chars=60, longer_than=300),
        deobfuscate=True,
    )
    here = ChatModel.load(str(fitted[2] / "model"), dtype="float32")
    found, reference = (list(wide.scan(backend, asked)) for backend in (model, here))
    assert [len(verdict.evidence) for verdict in found] == [1] * len(tiny.LONG) + [0, 0]
    for ours, theirs in zip(found, reference, strict=True):
        assert abs(ours.score - theirs.score) <= 1e-3 * guard.spread
        assert ours.obfuscations == theirs.obfuscations


def test_aborted_requests_leave_nothing_behind(engine):
    from vllm import SamplingParams

    guard, reference, model = engine
    llm = model.engine.llm_engine
    for round_number in range(3):
        model.engine.reset_prefix_cache()
        for number, layout in enumerate(model.chat(PROMPTS[:20])):
            tokens = {"prompt_token_ids": list(layout.ids)}
            llm.add_request(f"x{round_number}-{number}", tokens, SamplingParams(max_tokens=64))
        for _ in range(2):
            llm.step()
        llm.abort_request([f"x{round_number}-{n}" for n in range(20)])
        close(list(model.verdicts(guard, PROMPTS)), reference, guard)


def test_a_second_engine_beside_it_is_refused(engine, fitted):
    with pytest.raises(ModelError, match="holds one engine"):
        tiny.start(fitted[-1] / "guard")


def test_with_scoring_off_nothing_old_is_read(engine):
    """The blocks were used before, so their slots held other prompts' scores."""
    from latentguard.integrations.vllm import model as inside

    guard, reference, model = engine
    list(model.verdicts(guard, PROMPTS))
    guarded = inside.models[-1]
    model.engine.reset_prefix_cache()
    guarded.set_aux_hidden_state_layers(())
    try:
        with pytest.raises(GuardError, match="not a finite number"):
            list(model.verdicts(guard, PROMPTS[:8]))
    finally:
        guarded.set_aux_hidden_state_layers(guarded._columns.layers)
    with pytest.raises(GuardError, match="not a finite number"):
        # cached blocks of that pass were never scored; they must not pass now either
        list(model.verdicts(guard, [PROMPTS[-1], *PROMPTS[:8]]))
    model.engine.reset_prefix_cache()
    close(list(model.verdicts(guard, PROMPTS)), reference, guard)


def test_other_tokens_than_those_asked_about_get_no_score(engine, monkeypatch):
    guard, _, model = engine
    real = model.chat

    class Moved:
        def __call__(self, prompts):
            return [replace(lay, ids=(*lay.ids[:-1], 1)) for lay in real(prompts)]

    from latentguard.integrations.vllm import backend

    asked = backend.score_request
    monkeypatch.setattr(
        backend, "score_request", lambda lay, *more: asked(real(PROMPTS[:1])[0], *more)
    )
    monkeypatch.setattr(model, "chat", Moved())
    with pytest.raises(GuardError, match="gave no score"):
        list(model.verdicts(guard, PROMPTS[:1]))


def test_the_answer_is_there_before_the_first_token(engine):
    """What streaming relies on: posted in the step that computes the prompt, not later."""
    from vllm import SamplingParams

    from latentguard.integrations.vllm.score_request import score_request

    _, _, model = engine
    llm = model.engine.llm_engine
    model.engine.reset_prefix_cache()
    for number, prompt in enumerate(PROMPTS[-4:]):
        layout = model.chat([prompt])[0]
        ask = score_request(layout, model.columns.positions, model._channel)
        how = SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": ask.params})
        llm.add_request(f"first-{number}", {"prompt_token_ids": list(layout.ids)}, how)
        answers = []
        while llm.has_unfinished_requests():
            outputs = llm.step()
            answers += model._channel.collect()
            said = any(len(out.outputs[0].token_ids) for out in outputs)
            assert not said or [a.key for a in answers] == [ask.key]


def broken(folder, tmp_path, what):
    """A copy of the model that is not the guard's own."""
    shutil.copytree(folder / "model", tmp_path / "model")
    if what == "weights":
        from safetensors.torch import load_file, save_file

        path = tmp_path / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.3.self_attn.k_proj.weight"] *= 1.01
        save_file(tensors, path, metadata={"format": "pt"})
    elif what == "template":
        path = tmp_path / "model" / "chat_template.jinja"
        path.write_text(path.read_text().replace("helpful", "careful"))
    else:
        path = tmp_path / "model" / "tokenizer.json"
        spec = json.loads(path.read_text())
        spec["model"]["merges"] = spec["model"]["merges"][:-1]
        path.write_text(json.dumps(spec))
    return str(tmp_path / "model")
