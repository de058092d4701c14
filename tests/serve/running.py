"""A tiny guarded model, and services of it: in this process, or in one of its own."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from latentguard.serve import server
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.config import ServeConfig
from latentguard.serve.keys import ApiKeys
from models.architectures import chat_model
from models.families import FAMILIES

post = functools.partial(httpx.post, verify=False, timeout=60)  # certificates take long to load
get = functools.partial(httpx.get, verify=False, timeout=60)
stream = functools.partial(httpx.stream, verify=False, timeout=60)

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"


def tiny_model():
    """A random Llama that speaks ChatML, always the same."""
    return chat_model("llama", FAMILIES["qwen2.5"].tokenizer)


@functools.cache
def tiny_guard(reading="span", probe="linear"):
    """A guard of it that flags about half of all prompts."""
    torch.set_num_threads(1)
    rows = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair]
    model = tiny_model()
    guard = LatentGuard.fit(model, rows[:80], reading=reading, probe=probe)
    scores = sorted(v.score for v in guard.scan(model, PROMPTS))
    return replace(guard, threshold=(scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2)


PROMPTS = [p.text for p in load_contrast("test")[:40]]


@functools.cache
def offline(reading="span"):
    """What ``guard.scan`` says of the prompts, on a model of its own."""
    return dict(zip(PROMPTS, tiny_guard(reading).scan(tiny_model(), PROMPTS), strict=True))


def flagged():
    """A prompt that the guard flags, far from the threshold."""
    return max(PROMPTS, key=lambda text: offline()[text].score)


def passed():
    """A prompt that it lets through."""
    return min(PROMPTS, key=lambda text: offline()[text].score)


@functools.cache
def band_guard():
    """One with a band to review: of the prompts about a quarter each is flagged and reviewed."""
    prompts = [Prompt(text, harmful=False) for text in PROMPTS]
    rates = dict(max_fpr=0.25, review_fpr=0.5, confidence=0.5)
    guard = tiny_guard().calibrate(tiny_model(), prompts, **rates)
    part = guard.thresholds
    block, review = map(_between, (part.common.block, part.common.review))
    part = replace(part, common=replace(part.common, block=block, review=review))
    return replace(guard, threshold=block.threshold, bound=block, thresholds=part)


def _between(bound):
    """No prompt's score is the threshold, where rounding would decide."""
    above = min(v.score for v in offline().values() if v.score > bound.threshold)
    return replace(bound, threshold=(bound.threshold + above) / 2)


def reviewed():
    """A prompt in the middle of its band."""
    verdicts = zip(PROMPTS, band_guard().scan(tiny_model(), PROMPTS), strict=True)
    band = [(v.score, text) for text, v in verdicts if v.decision == "review"]
    return sorted(band)[len(band) // 2][1]


def opener(reading="span", probe="linear"):
    """Guard and model, checked."""
    guard, model = tiny_guard(reading, probe), tiny_model()
    guard.verify_model(model)
    return guard, model


@contextlib.contextmanager
def running(
    open_guard=opener,
    *,
    keys=(),
    audit=None,
    reference=None,
    guards=None,
    open_telemetry=None,
    ready=True,
    **options,
):
    """A service in a thread of this process, as its URL."""
    log = AuditLog(audit) if isinstance(audit, (str, Path)) else audit
    made = server.create_server(
        open_guard,
        ServeConfig(**{"name": "tiny", "drain": 5.0, "probe_upstream": False} | options),
        keys=ApiKeys(keys),
        audit=log,
        reference=reference,
        guards=guards or server.GuardSource(),
        open_telemetry=open_telemetry,
        host="127.0.0.1",
        port=0,
    )
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{_port(made)}"
        if ready:
            wait_ready(url)
        yield Running(url, made)
    finally:
        made.should_exit = True
        thread.join(20)


class Running(str):
    """A URL that knows its server."""

    def __new__(cls, url, made):
        self = super().__new__(cls, url)
        self.server = made
        return self


def _port(made):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for one in getattr(made, "servers", ()):
            return one.sockets[0].getsockname()[1]
        time.sleep(0.01)
    raise AssertionError("the server did not start")


def wait_ready(url, seconds=300):
    """Wait until the service is ready."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if get(f"{url}/readyz").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("the service did not become ready")


class Nursery:
    """Starts the command in processes of their own, all from one that has imported everything."""

    def __init__(self, folder):
        paths = [str(SOURCE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        env |= {"LATENTGUARD_SERVE_CLOSE_DELAY": "0"}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "serve.child"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stderr, self._folder = Path(folder) / "stderr", folder

    def ask(self, **what):
        """Ask the process that starts the others."""
        self._parent.stdin.write(json.dumps(what) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())

    @contextlib.contextmanager
    def process(self, *arguments, environment=None):
        """The command with some arguments."""
        how = dict(stderr=str(self._stderr), environment=environment or {})
        child = Child(self, self.ask(start=[str(a) for a in arguments], **how), self._stderr)
        try:
            yield child
        finally:
            if child.code is None:
                child.kill(signal.SIGKILL)
                child.wait()

    def close(self):
        """ReplyEnd."""
        self._parent.stdin.close()
        self._parent.wait(60)
        self._parent.stdout.close()


class Child:
    """A running command."""

    def __init__(self, nursery, pid, stderr):
        self.pid, self.code, self._nursery, self._stderr = pid, None, nursery, stderr

    def kill(self, number):
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds=30):
        """The exit code."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            self.code = self._nursery.ask(poll=self.pid)
            time.sleep(0.02)
        assert self.code is not None, "it still runs"
        return self.code

    @property
    def stderr(self):
        """What it said."""
        return self._stderr.read_text()
