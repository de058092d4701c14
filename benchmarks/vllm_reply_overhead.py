"""What judging a reply costs a token inside vLLM, in the engine and in its server.

    python benchmarks/vllm_reply_overhead.py --guard DIR [--model M] [--prompts N] [--tokens N]

Runs in the environment of ``make vllm-env``, on one thread. ``--guard`` is a guard with a reply
part; without one there, a guard is fitted on the built-in prompts, with a random reply probe, and
saved there. One engine writes the same greedy replies in three arms, in pairs and in random order,
with an empty prefix cache each time:

* plain: no states are handed out, nothing is scored;
* prompts: prompts are scored, as with a guard without a reply part;
* replies: each token is scored, too, and its score is brought to the server's process.

Then what is done for a token by itself, without a model: in the engine's process (which tokens are
due, reading their scores, sending them) and in the server's (a stream judged over one that is sent
straight on). Printed: ratios of processor time, less one, and microseconds, with 95 % bootstrap
intervals. ``--batches`` without a number measures these alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyProbe
from latentguard.models.chat_model import ChatModel
from latentguard.probes.probe import Probe, layers_of
from latentguard.prompts import Prompt
from latentguard.stats.bootstrap import bootstrap

ARMS = ("plain", "prompts", "replies")
EVENTS = 64
"""Tokens of a stream through the middleware."""


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    if not options.guard.exists():
        fit(options.model, options.guard)
    record: dict[str, Any] = dict(model=options.model, found={})
    if options.out and options.out.exists():  # other batches of an earlier run
        record = json.loads(options.out.read_text(encoding="utf-8"))
    record["engine"] = measure_engine_part(options.streams)
    record["middleware"] = measure_middleware(LatentGuard.load(options.guard), options.streams)
    model = start(options.guard, options.model) if options.batches or options.last else None
    harmless = [p for p in load_guard_prompts("test") if not p.harmful and len(p.text) < 200]
    if options.last:
        record["last"] = measure_last_token(model, harmless[: options.prompts], options.tokens)
    for batch in options.batches:
        count = max(batch, options.prompts // batch * batch)
        groups = [harmless[n : n + batch] for n in range(0, count, batch)]
        record["found"][str(batch)] = measure_batch(model, groups, options.tokens)
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def fit(model: str, out: Path) -> None:
    """Save a guard with the default reading, and a reply probe of random weights."""
    backend = ChatModel.load(model, dtype="float32")
    guard = LatentGuard.fit(backend, [p for p in load_contrast("train") if p.pair][:120])
    layers = layers_of("linear", backend.depth)
    torch.manual_seed(0)
    probe = Probe("linear", layers, torch.randn(len(layers), backend.width) / 100, 0.0)
    judge = ReplyProbe(probe, (1.0, 0.0), 1.0, {}, threshold=1e9)
    replace(guard, replies=judge).save(out)


def start(guard: Path, model: str) -> Any:
    """One engine for the guard, in this process."""
    from latentguard.integrations.vllm.backend import VllmModel

    return VllmModel.load(
        guard,
        None if model == "default" else model,
        enforce_eager=True,
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.2,
        max_model_len=1024,
        max_num_seqs=32,
    )


def measure_batch(model: Any, groups: Sequence[Sequence[Prompt]], tokens: int) -> dict[str, Any]:
    """Milliseconds a token of each arm, and by how much more than each other."""
    for arm in ARMS:
        write(model, groups[0], 4, arm)  # what is loaded at first use
    order = random.Random(0)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for group in groups:
        for arm in order.sample(ARMS, len(ARMS)):
            seconds[arm].append(write(model, group, tokens, arm) / tokens / len(group))
    return dict(
        groups=len(groups),
        tokens=tokens,
        ms={arm: 1000 * float(np.mean(own)) for arm, own in seconds.items()},
        over_plain=asdict(ratio(seconds["plain"], seconds["replies"])),
        over_prompts=asdict(ratio(seconds["prompts"], seconds["replies"])),
    )


def write(model: Any, prompts: Sequence[Prompt], tokens: int, arm: str) -> float:
    """Processor seconds of writing greedy replies of so many tokens."""
    from vllm import SamplingParams

    from latentguard.integrations.vllm import model as inside
    from latentguard.integrations.vllm.score_request import TokenScores, score_request

    layers = () if arm == "plain" else model.columns.layers
    inside.models[-1].set_aux_hidden_state_layers(layers)
    model.engine.reset_prefix_cache()
    began = process_time()
    layouts = model.chat(prompts)
    extra: list[dict[str, Any] | None] = [None] * len(layouts)
    if arm != "plain":
        tail = 0 if arm == "replies" else None
        for number, layout in enumerate(layouts):
            positions = model.columns.positions
            request = score_request(layout, positions, model._channel, tail=tail)
            extra[number] = {"kv_transfer_params": request.params}
    how = [
        SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, extra_args=more)
        for more in extra
    ]
    ids = [{"prompt_token_ids": list(layout.ids)} for layout in layouts]
    with model._channel.reading() as posted:
        model.engine.generate(ids, how, use_tqdm=False)
    spent = process_time() - began
    read = sum(len(part.values) for part in posted if isinstance(part, TokenScores))
    assert read == (len(prompts) * (tokens - 1) if arm == "replies" else 0)
    return spent


def measure_last_token(model: Any, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Milliseconds of the pass that reads the last token of a reply of so many tokens."""
    from latentguard.integrations.vllm.score_request import reply_request

    write(model, prompts[:1], 4, "replies")
    seconds, lengths = list[float](), list[int]()
    for prompt in prompts:
        [ids] = write_ids(model, prompt, tokens)
        request = reply_request(ids, model._channel, tail=1)
        began = process_time()
        [posted] = model._generate([ids], [request], max_tokens=1)
        seconds.append(process_time() - began)
        lengths.append(len(ids))
        assert len(posted.values) == 1
    more = bootstrap(np.mean, 1000 * np.array(seconds))
    return dict(prompts=len(prompts), mean_tokens=float(np.mean(lengths)), ms=asdict(more))


def write_ids(model: Any, prompt: Prompt, tokens: int) -> list[list[int]]:
    """A prompt and its greedy reply as token ids."""
    from vllm import SamplingParams

    ids = [list(layout.ids) for layout in model.chat([prompt])]
    how = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    outputs = model.engine.generate(
        [{"prompt_token_ids": own} for own in ids], [how] * len(ids), use_tqdm=False
    )
    return [[*own, *output.outputs[0].token_ids] for own, output in zip(ids, outputs, strict=True)]


def measure_engine_part(streams: int) -> dict[str, Any]:
    """Microseconds a token in the engine's process, for one reply at a time."""
    from latentguard.integrations.vllm.score_channel import ScoreChannel, post
    from latentguard.integrations.vllm.score_request import ScoreRequest, digest_ids
    from latentguard.integrations.vllm.slots import Ledger, SlotScores

    channel = ScoreChannel()
    ids = list(range(40))
    request = ScoreRequest(channel.path, channel.key(), digest_ids(ids), (39,), (), 0)
    scores = SlotScores(128 * 32, 12, 32, torch.device("cpu"))
    seconds = list[float]()
    for number in range(streams + 1):
        ledger = Ledger(32)
        ledger.step(scheduler_output(ids, request))
        began = process_time()
        for token in range(EVENTS):
            step = ledger.step(scheduler_output(None, request, len(ids) + token))
            read = scores.read_replies(step.replies)
            post([], zip([request], read, strict=True))
            assert len(channel.collect()) == 1
        if number:
            seconds.append((process_time() - began) / EVENTS)
    channel.close()
    more = bootstrap(np.mean, 1e6 * np.array(seconds))
    return dict(streams=streams, tokens=EVENTS, microseconds_a_token=asdict(more))


def scheduler_output(ids: list[int] | None, request: Any, computed: int = 0) -> Any:
    """What vLLM's scheduler says of a prompt's pass, or of one that decodes a token."""
    extra = {"kv_transfer_params": request.params}
    new = SimpleNamespace(
        req_id="a",
        prompt_token_ids=ids,
        block_ids=([*range(64)],),
        num_computed_tokens=0,
        sampling_params=SimpleNamespace(extra_args=extra),
    )
    old = SimpleNamespace(
        req_ids=[] if ids else ["a"],
        new_block_ids=[None],
        num_computed_tokens=[computed],
        resumed_req_ids=set(),
    )
    if ids:
        old.new_block_ids = []
        old.num_computed_tokens = []
    return SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[new] if ids else [],
        scheduled_cached_reqs=old,
        num_scheduled_tokens={"a": len(ids) if ids else 1},
        kv_cache_block_copies=None,
    )


def measure_middleware(guard: LatentGuard, streams: int) -> dict[str, Any]:
    """Microseconds a token of a stream that is sent straight on, and of one that is judged."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(streams + 1):
        for is_judged in (number % 2 == 0, number % 2 == 1):
            began = process_time()
            asyncio.run(send_stream(guard, is_judged=is_judged))
            if number:
                seconds[is_judged].append((process_time() - began) / EVENTS)
    own = np.array(seconds[True]) - np.array(seconds[False])
    more = bootstrap(np.mean, 1e6 * own)
    return dict(streams=streams, tokens=EVENTS, microseconds_a_token=asdict(more))


async def send_stream(guard: LatentGuard, *, is_judged: bool) -> None:
    """One stream through the middleware's part of a reply."""
    from latentguard.integrations.vllm.held_reply import HeldReply
    from latentguard.integrations.vllm.judged_reply import JudgedChat, JudgedReply
    from latentguard.integrations.vllm.reply_tokens import ReplyOptions, TokenScoreLog
    from latentguard.integrations.vllm.score_request import TokenScores
    from latentguard.serve.config import ServeConfig

    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    log = TokenScoreLog.of(1)
    reply = SimpleNamespace(options=ReplyOptions.of({"model": "m", "stream": True}), log=log)
    chat = SimpleNamespace(reply=reply, own=SimpleNamespace(ids=(1,)))
    part = SimpleNamespace(guard=guard, collect=lambda: None)
    judged: Any = JudgedReply(
        JudgedChat(part, chat, ServeConfig(), asyncio.Event()),  # type: ignore[arg-type]
        send,
    )
    held = HeldReply(judged.take if is_judged else send)

    async def server() -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await held.take({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(EVENTS):
            if number and is_judged:
                log.add(TokenScores("k", 0, number - 1, (0.1,)))
            await held.take(event_of(number, is_judged=is_judged))
            await asyncio.sleep(0)
        await held.take({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    inner = asyncio.create_task(server())
    await held.release({"latentguard": {"flagged": False}})
    if is_judged:
        await judged.run(inner, {})
    await inner
    assert sent > 100 * EVENTS


def event_of(number: int, *, is_judged: bool) -> dict[str, Any]:
    """A token as vLLM writes it; its id is there if the reply is judged."""
    choice: dict[str, Any] = dict(index=0, delta={"content": " word"}, logprobs=None)
    choice["finish_reason"] = "stop" if number == EVENTS - 1 else None
    if is_judged:
        choice["token_ids"] = [number]
    head = dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model="m")
    body = f"data: {json.dumps(head | dict(choices=[choice]))}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}


def ratio(before: Sequence[float], after: Sequence[float]) -> Any:
    """By how much more, with its interval."""

    def share(a: Any, b: Any) -> float:
        return float(np.sum(b) / np.sum(a) - 1)

    return bootstrap(share, np.array(before), np.array(after), paired=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guard", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--last", action="store_true", help="time the pass of the last token")
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
