"""A service in a process of its own for ``attacks.py``, of this or an earlier source.

Run as a program it serves and prints one line of JSON: its URL, and the built-in prompts that its
guard flags and passes, the surest first. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Side:
    """A source and a model whose service is attacked."""

    root: Path
    """A checkout."""

    model: str
    """``tiny`` or what is loaded."""

    guard: Path | None
    """The guard of that model; None for the tiny one."""


@dataclass(frozen=True)
class ServiceProcess:
    """A running service."""

    url: str
    pid: int
    flagged: list[str]
    passed: list[str]
    scores: dict[str, float]

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS

    @property
    def memory_mib(self) -> float:
        """Resident memory."""
        return self._status("VmRSS")

    @property
    def peak_memory_mib(self) -> float:
        """The most resident memory so far."""
        return self._status("VmHWM")

    def _status(self, name: str) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) / 1024


@contextlib.contextmanager
def serving(
    side: Side, *, keys: list[str] | None = None, texts: int | None = None, **options: Any
) -> Iterator[ServiceProcess]:
    """A service of a side, and its scores of the first ``texts`` built-in prompts.

    Options that its source does not know are left out.
    """
    command = [sys.executable, __file__, "--tests", str(side.root / "tests"), "--model", side.model]
    command += ["--options", json.dumps(options), "--keys", ",".join(keys or [])]
    command += ["--guard", str(side.guard)] if side.guard else []
    command += ["--texts", str(texts)] if texts else []
    env = os.environ | {"PYTHONPATH": str(side.root / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the service of {side.root} did not start")
        yield ServiceProcess(pid=process.pid, **json.loads(line))
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ratio_interval(ratios: Sequence[float], *, digits: int) -> list[float]:
    """95 % bootstrap interval of the median of ratios."""
    from latentguard.stats.bootstrap import bootstrap

    found = bootstrap(np.median, ratios, method="percentile")
    return [round(found.low, digits), round(found.high, digits)]


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--guard", type=Path)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--keys", default="")
    parser.add_argument("--texts", type=int)
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.tests))
    import torch

    torch.set_num_threads(1)
    running = importlib.import_module("serve.running")
    record = getattr(running, "ServeConfig", None) or running.Options
    known = {field.name for field in fields(record)}
    options = {name: value for name, value in asked.options.items() if name in known}
    guard, model = running.opener() if asked.guard is None else _open(asked.guard, asked.model)
    texts = [prompt.text for prompt in running.load_contrast("test")][: asked.texts]
    verdicts = dict(zip(texts, guard.scan(model, texts), strict=True))
    order = sorted(texts, key=lambda text: verdicts[text].score)
    keys = [key for key in asked.keys.split(",") if key]
    with running.running(lambda: (guard, model), keys=keys, **options) as url:
        about = dict(
            url=str(url),
            flagged=[text for text in reversed(order) if verdicts[text].flagged],
            passed=[text for text in order if not verdicts[text].flagged],
            scores={text: verdict.score for text, verdict in verdicts.items()},
        )
        sys.stdout.write(f"{json.dumps(about)}\n")
        sys.stdout.flush()
        sys.stdin.read()


def _open(folder: Path, source: str) -> tuple[Any, Any]:
    """Guard and model, by the names of this source or of the earlier one."""
    for guards, models in (
        ("latentguard.guard.latent_guard", "latentguard.models.chat_model"),
        ("latentguard.guard", "latentguard.model.hf"),
    ):
        with contextlib.suppress(ModuleNotFoundError):
            guard_class = importlib.import_module(guards).LatentGuard
            model = importlib.import_module(models).ChatModel.load(source)
            return guard_class.load(folder), model
    raise SystemExit("neither source has a guard under a name known here")


if __name__ == "__main__":
    main()
