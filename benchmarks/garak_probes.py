"""garak against the service, unguarded and guarded: how often each family of attacks succeeds.

    python benchmarks/garak_probes.py --garak .venv-garak/bin/python [--guard default] [--cap 5]

garak has an environment of its own: install torch==2.13.0 there, then garak==0.17.1. Both services
answer by the guard's own model; the unguarded one has the policy ``shadow``. Only probes whose
detectors need no model are run, so nothing is downloaded. Prompts and replies are not kept: garak's
reports lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from latentguard.files import write_atomic

RESULTS = Path(__file__).parent / "results" / "garak.json"

PROBES = (
    "donotanswer.MaliciousUses",
    "encoding.InjectBase64",
    "grandma.Substances",
    "malwaregen.Payload",
    "promptinject.HijackHateHumans",
    "suffix.GCGCached",
)
"""Probes whose main detector compares strings."""

POLICIES = {"unguarded": "shadow", "guarded": "block"}
"""What is compared -> the service's policy."""

COMMAND = (sys.executable, "-c", "from latentguard.cli import main; main()")

CAPPED = """
import sys
from garak import cli
from garak.probes import base
run = base.Probe.probe
def capped(self, generator):
    self.prompts = self.prompts[:int(sys.argv[1])]
    return run(self, generator)
base.Probe.probe = capped
cli.main(sys.argv[2:])
"""
"""garak with the first prompts of each probe; its own cap holds for some probes only."""

KEY = "OPENAICOMPATIBLE_API_KEY"
"""garak asks for one, though the service does not."""


@dataclass(frozen=True)
class ProbeCount:
    """How one probe fared."""

    probe: str
    """As garak names it."""

    detector: str
    """What decides whether an attack succeeded."""

    prompts: int
    """Replies that were judged."""

    successes: int
    """Of these, those that the detector takes for a success."""

    unanswered: int
    """Prompts without a reply, as those that are too long."""


def run_garak(garak: Path, url: str, probes: Iterable[str], cap: int) -> list[ProbeCount]:
    """Run probes against a service.

    Args:
        garak: Python of the environment with garak.
        url: The service.
        probes: Which.
        cap: Prompts of a probe at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(garak_config(url, cap, Path(folder))))
        command = [str(garak), "-c", CAPPED, str(cap), "--config", str(config)]
        command += ["--target_type", "openai.OpenAICompatible", "--target_name", "guarded"]
        command += ["--probes", ",".join(probes)]
        offline = {"HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": folder, "XDG_CACHE_HOME": folder}
        environment = os.environ | offline | {KEY: "none"}
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        reports = sorted(Path(folder).rglob("*.report.jsonl"))
        if done.returncode or not reports:
            raise SystemExit(f"garak failed: {(done.stderr or done.stdout)[-2000:]}")
        return count_successes(reports[0])


def garak_config(url: str, cap: int, folder: Path) -> dict[str, object]:
    """One generation a prompt, greedy, of at most 24 tokens."""
    generator = {
        "uri": f"{url}/v1/",
        "temperature": 0.0,
        "max_tokens": 24,
        "stop": [],
        "suppressed_params": ["frequency_penalty", "presence_penalty", "seed", "n"],
    }
    return {
        "system": {"narrow_output": True, "lite": False},
        "run": {"generations": 1, "soft_probe_prompt_cap": cap, "seed": 0},
        "plugins": {
            "extended_detectors": False,
            "generators": {"openai": {"OpenAICompatible": generator}},
        },
        "reporting": {"report_dir": str(folder), "confidence_interval_method": "none"},
    }


def count_successes(report: Path) -> list[ProbeCount]:
    """The counts in a report of garak's, without a text."""
    counts = []
    for line in report.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("entry_type") == "eval":
            numbers = int(entry["total_evaluated"]), int(entry["fails"]), int(entry["nones"])
            counts.append(ProbeCount(entry["probe"], entry["detector"], *numbers))
    return counts


@contextlib.contextmanager
def service(guard: str, policy: str) -> Iterator[str]:
    """A running service of a guard, as its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "serve", guard, "--policy", policy, "--deadline", "600"]
    url = f"http://127.0.0.1:{port}"
    child = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        _wait(url, child)
        yield url
    finally:
        child.terminate()
        child.wait(60)


def _wait(url: str, child: subprocess.Popen[bytes], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit("The service did not become ready.")


def harmless_refused(url: str, prompts: Iterable[str]) -> tuple[int, int]:
    """How many harmless prompts a service refuses, and of how many."""
    refused = total = 0
    for text in prompts:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        refused += answer["choices"][0]["finish_reason"] == "content_filter"
        total += 1
    return refused, total


def main() -> None:
    """Run both, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--garak", type=Path, required=True)
    parser.add_argument("--guard", default="default")
    parser.add_argument("--cap", type=int, default=5)
    parser.add_argument("--harmless", type=int, default=20)
    parser.add_argument("--probes", nargs="*", default=PROBES)
    options = parser.parse_args()
    from latentguard.data.builtin import load_guard_prompts

    harmless = [one.text for one in load_guard_prompts("test") if not one.harmful][
        : options.harmless
    ]
    record: dict[str, object] = {"guard": options.guard, "cap": options.cap, "garak": "0.17.1"}
    record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    for name, policy in POLICIES.items():
        with service(options.guard, policy) as url:
            counts = run_garak(options.garak, url, options.probes, options.cap)
            record[name] = [asdict(one) for one in counts]
            if policy == "block":
                refused, total = harmless_refused(url, harmless)
                record["harmless"] = {"refused": refused, "prompts": total}
        _print(name, counts)
    write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")


def _print(name: str, counts: Iterable[ProbeCount]) -> None:
    for one in counts:
        print(f"{name}: {one.probe} {one.successes} of {one.prompts}", flush=True)


if __name__ == "__main__":
    main()
