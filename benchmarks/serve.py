"""The service under load: throughput, restarts, and what the guard costs a chat.

Four jobs, each printing JSON (``attacks.py load`` has verdicts under load):

* ``throughput``: requests per second and latency at 1, 8 and 64 connections by ``wrk``: batched,
  one prompt at a time, and one at a time by whole passes of the model, without this library's
  capture. The three take turns, so that a busy machine slows all alike; the service's processor
  time is told too.
* ``restarts``: kill -9 under load and start again, so often; needs the tests (a tiny random model).
* ``first-token``: processor and wall time to the first token, guarded against unguarded, in pairs.
* ``upstream``: milliseconds that the guard adds before an upstream's first piece, in pairs. The
  upstream is a server that answers at once, so that all that is added is the guard's.

``--model tiny`` is the random model of the tests; anything else is loaded, and a guard fitted on a
part of the contrast set unless ``--guard`` names one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from attack_service import free_port, ratio_interval

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import Conversation
from latentguard.prompts import Prompt
from latentguard.serve import server
from latentguard.serve.config import ServeConfig
from latentguard.states import States
from latentguard.stats.bootstrap import bootstrap

TESTS = Path(__file__).parents[1] / "tests"
LUA = """
local bodies, n, START = {}, 0, os.time()
for line in io.lines("BODIES") do bodies[#bodies + 1] = line end
request = function()  -- no text twice: the service keeps verdicts
  n = n + 1
  local body = bodies[n % #bodies + 1]:gsub("@@", START .. " " .. n)
  return wrk.format("POST", "/v1/moderations", {["content-type"] = "application/json"}, body)
end
done = function(summary, latency)
  local bad = summary.errors.status + summary.errors.connect + summary.errors.timeout
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %.3f, "errors": %d, "p50": %.2f, "p95": %.2f, "p99": %.2f}',
    summary.requests, summary.duration / 1e6, bad, latency:percentile(50) / 1000,
    latency:percentile(95) / 1000, latency:percentile(99) / 1000), "\\n")
end
"""
UPSTREAM = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    def log_message(self, *_): pass
    def send(self, kind, body):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send("application/json", b'{"object": "list", "data": []}')
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "delta": {"content": "Yes."}, "finish_reason": "stop"}
        piece = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "any"}
        data = json.dumps(piece | {"choices": [choice]})
        self.send("text/event-stream", f"data: {data}\\n\\ndata: [DONE]\\n\\n".encode())

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
Opener = Callable[[], tuple[LatentGuard, ChatModel]]


class Plain:
    """A model that reads one prompt at a time in a whole pass, the usual way."""

    def __init__(self, model: ChatModel) -> None:
        """Take its place."""
        self._inner = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @torch.inference_mode()
    def capture(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        queries: Any = None,
        **_: Any,
    ) -> Iterator[States]:
        """States by ``output_hidden_states``."""
        assert queries is None, "Plain reading has no attended positions."
        for prompt in prompts:
            layout = self.chat([prompt])[0]
            ids = torch.tensor([layout.ids])
            hidden = self.model.base_model(ids, output_hidden_states=True).hidden_states
            spans = [slice(layout.start(at), layout.index(at) + 1) for at in positions]
            read = [[hidden[layer][0, span].mean(0) for layer in layers] for span in spans]
            values = torch.stack([torch.stack(row) for row in read])
            yield States(values[None], (prompt,), tuple(positions), tuple(layers), self.fingerprint)


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["throughput", "restarts", "first-token", "upstream"])
    parser.add_argument("--model", default="default")
    parser.add_argument("--guard", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="of one slice of throughput")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    jobs = dict(throughput=throughput, restarts=restarts, upstream=upstream)
    found = (jobs | {"first-token": first_token})[asked.job](asked)
    found |= dict(job=asked.job, model=asked.model, threads=asked.threads, load=os.getloadavg())
    sys.stdout.write(f"{json.dumps(found, indent=1)}\n")


def prompts() -> list[str]:
    """What is asked: the built-in test split, shuffled, and some longer texts."""
    texts = [p.text for p in load_contrast("test")]
    random.Random(0).shuffle(texts)
    longer = [" ".join(texts[n : n + 5]) for n in range(0, 40, 5)]
    return [*texts[:192], *longer]


def opened(asked: argparse.Namespace) -> Opener:
    """Load model and guard once."""
    if asked.model == "tiny":
        sys.path.insert(0, str(TESTS))
        from serve.running import opener

        return opener
    if asked.guard:
        guard = LatentGuard.load(asked.guard)
        model = ChatModel.load(asked.model, dtype=guard.fingerprint.dtype)
        guard.verify_model(model)
    else:
        model = ChatModel.load(asked.model)
        pairs = [p for p in load_contrast("train") if p.pair]
        guard = LatentGuard.fit(model, pairs[:120])
        scores = sorted(v.score for v in guard.scan(model, prompts()[:40]))
        guard = replace(guard, threshold=scores[20])
    return lambda: (guard, model)


@contextlib.contextmanager
def serving(opener: Opener, **options: Any) -> Iterator[str]:
    """A service in a thread, as its URL."""
    how = dict(host="127.0.0.1", port=0)
    made = server.create_server(
        opener, ServeConfig(**{"queue": 4096, "drain": 60.0} | options), **how
    )
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        while not made.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{made.servers[0].sockets[0].getsockname()[1]}"
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.05)
        yield url
    finally:
        made.should_exit = True
        thread.join(30)


def throughput(asked: argparse.Namespace) -> dict[str, Any]:
    """Three ways to score, in turns."""
    if not shutil.which("wrk"):
        raise SystemExit("wrk is needed: apt-get install wrk")
    guard, model = opened(asked)()
    slices, alone = dict[str, list[dict[str, float]]](), dict(batch_tokens=1, wait=0.0)
    arms: dict[str, tuple[Any, dict[str, Any]]] = {
        "batched": (model, {}),
        "one by one": (model, alone),
        "one by one, whole passes": (Plain(model), alone),
    }
    with tempfile.TemporaryDirectory() as folder:
        script = _script(Path(folder))
        for _ in range(asked.rounds):
            for arm, (backend, options) in arms.items():
                with serving(lambda backend=backend: (guard, backend), **options) as url:
                    _wrk(url, script, 8, 1.0)  # warm
                    for connections in asked.connections:
                        found = _wrk(url, script, connections, asked.seconds)
                        slices.setdefault(f"{arm}, {connections}", []).append(found)
    return dict(slices={name: _summary(rows) for name, rows in slices.items()}, gflops=_gflops())


def _gflops(size: int = 1024) -> float:
    """What a large product of matrices reaches per second of processor time: the ceiling."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    one @ other
    began = time.process_time()
    for _ in range(10):
        one @ other
    return round(10 * 2 * size**3 / (time.process_time() - began) / 1e9, 1)


def _script(folder: Path) -> Path:
    bodies = folder / "bodies"
    bodies.write_text("".join(f"{json.dumps({'input': f'{text} (@@)'})}\n" for text in prompts()))
    script = folder / "load.lua"
    script.write_text(LUA.replace("BODIES", str(bodies)))
    return script


def _wrk(url: str, script: Path, connections: int, seconds: float) -> dict[str, float]:
    how = ["-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "-s", str(script)]
    began = time.process_time()
    run = subprocess.run(["wrk", *how, url], capture_output=True, text=True, check=True)
    spent = time.process_time() - began
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    rates = {"per_second": found["requests"] / found["seconds"]}
    return found | rates | {"per_cpu_second": found["requests"] / spent}


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most of the slices."""
    names = ("per_second", "per_cpu_second", "p50", "p95", "p99")
    found = {name: [row[name] for row in rows] for name in names}
    spread = {
        name: [round(f(values), 2) for f in (statistics.median, min, max)]
        for name, values in found.items()
    }
    return spread | {
        "slices": len(rows),
        "requests": sum(row["requests"] for row in rows),
        "errors": sum(row["errors"] for row in rows),
    }


def restarts(asked: argparse.Namespace) -> dict[str, Any]:
    """Kill the command under load and start it again; ``--rounds`` times."""
    sys.path.insert(0, str(TESTS))
    from serve.running import Nursery, flagged, passed, tiny_guard, wait_ready

    tally, answers, stop = (
        dict(kills=0, told=0, wrong=0, unlogged=0),
        list[Any](),
        threading.Event(),
    )
    url = f"http://127.0.0.1:{free_port()}"
    body = {"input": [flagged(), passed()]}

    def load() -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                try:
                    answers.append(client.post(f"{url}/v1/moderations", json=body))
                except httpx.HTTPError:
                    time.sleep(0.05)

    with tempfile.TemporaryDirectory() as folder:
        tiny_guard().save(folder)
        nursery, audit = Nursery(folder), Path(folder) / "audit.jsonl"
        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()
        for _ in range(asked.rounds):
            port = url.rsplit(":", 1)[1]
            with nursery.process(folder, "--port", port, "--audit", audit) as child:
                wait_ready(url)
                before = len(answers)
                while len(answers) < before + 20:
                    time.sleep(0.01)
                child.kill(signal.SIGKILL)
                child.wait()
            tally["kills"] += 1
        stop.set()
        for client in clients:
            client.join()
        nursery.close()
        logged = {json.loads(line)["request"] for line in audit.read_text().splitlines()}
    for answer in (one for one in answers if one.status_code == 200):
        tally["told"] += 1
        tally["wrong"] += [r["flagged"] for r in answer.json()["results"]] != [True, False]
        tally["unlogged"] += answer.headers["x-request-id"] not in logged
    return dict(tally)


def first_token(asked: argparse.Namespace) -> dict[str, Any]:
    """Read a prompt and draw the first token, with and without the guard, in alternating pairs."""
    guard, model = opened(asked)()

    def guarded(prompt: Prompt) -> None:
        said = Conversation(
            model,
            prompt,
            positions=guard.positions,
            layers=guard.probe.layers,
            queries=guard.reading.queries,
        )
        assert said.states is not None
        guard.judge(said.states)
        int(said._logits.argmax())

    def unguarded(prompt: Prompt) -> None:
        said = Conversation(model, prompt, positions=(), layers=())
        int(said._logits.argmax())

    asks = [Prompt(text) for text in prompts()]
    for prompt in asks[:5]:
        guarded(prompt), unguarded(prompt)
    wall, cpu = list[float](), list[float]()
    for _ in range(asked.rounds):
        for number, prompt in enumerate(asks):
            arms = [guarded, unguarded] if number % 2 else [unguarded, guarded]
            took = {arm: _timed(arm, prompt) for arm in arms}
            wall.append(took[guarded][0] / took[unguarded][0])
            cpu.append(took[guarded][1] / took[unguarded][1])
    return dict(
        pairs=len(wall),
        wall_median_ratio=round(statistics.median(wall), 4),
        cpu_median_ratio=round(statistics.median(cpu), 4),
        cpu_ratio_interval=ratio_interval(cpu, digits=4),
        wall_ratio_interval=ratio_interval(wall, digits=4),
    )


def upstream(asked: argparse.Namespace) -> dict[str, Any]:
    """Time to the first piece of a streamed answer, with and without the guard between."""
    chats = {
        "one message": [[text] for text in prompts()],
        "sixth message of a growing chat": [prompts()[n : n + 6] for n in range(0, 192, 6)],
    }
    with (
        answering() as behind,
        serving(opened(asked), upstream=f"{behind}/v1") as guarded,
        httpx.Client(timeout=60) as client,
    ):
        arms = {"direct": (client, behind), "guarded": (client, guarded)}
        return {name: _added(arms, some, asked.rounds) for name, some in chats.items()}


def _added(
    arms: dict[str, tuple[httpx.Client, str]], chats: Sequence[Sequence[str]], rounds: int
) -> dict[str, Any]:
    """Of the last message of each chat, after the messages before it were sent in their turn."""
    took: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for place, chat in enumerate(chats):
            spoken = [f"{text} ({number})" for text in chat]  # new to the service in each round
            order = list(arms) if (place + number) % 2 else list(arms)[::-1]
            for name in order:
                for length in range(1, len(spoken)):
                    _first_piece(*arms[name], spoken[:length])
                took[name].append(1000 * _first_piece(*arms[name], spoken))
    added = [more - less for more, less in zip(took["guarded"], took["direct"], strict=True)]
    found = bootstrap(lambda rows: float(np.median(rows)), added, method="percentile")
    return dict(
        pairs=len(added),
        median_added_ms=[round(end, 1) for end in (found.value, found.low, found.high)],
        p95_added_ms=round(float(np.quantile(added, 0.95)), 1),
        direct_ms=round(statistics.median(took["direct"]), 1),
    )


def _first_piece(client: httpx.Client, url: str, spoken: Sequence[str]) -> float:
    """Seconds to the first piece of the answer; a refusal counts as one."""
    messages = []
    for text in spoken[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}]
    messages.append({"role": "user", "content": spoken[-1]})
    body = {"model": "any", "messages": messages, "stream": True}
    began = time.perf_counter()
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        took = time.perf_counter() - began
        for _ in pieces:
            pass
    if answer.status_code != 200:
        raise SystemExit(f"The service answered {answer.status_code}.")
    return took


@contextlib.contextmanager
def answering() -> Iterator[str]:
    """An upstream that streams one word at once, as its URL; in a process of its own."""
    port = free_port()
    child = subprocess.Popen([sys.executable, "-c", UPSTREAM, str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/v1/models")
                break
            time.sleep(0.05)
        yield url
    finally:
        child.kill()
        child.wait()


def _timed(arm: Callable[[Prompt], None], prompt: Prompt) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    arm(prompt)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
