"""What Prometheus sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from latentguard.serve.drift import DriftMonitor
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.served_guards import DEFAULT_NAME

if TYPE_CHECKING:  # an extra
    from latentguard.serve.open_telemetry import OpenTelemetry

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """Counters, gauges and histograms of one service."""

    def __init__(
        self, reference: Sequence[float] = (), open_telemetry: OpenTelemetry | None = None
    ) -> None:
        """Make a registry of its own.

        Args:
            reference: Scores to compare with; their deciles are the buckets of the score histogram.
            open_telemetry: Is told the same; None for Prometheus alone.
        """
        self.open_telemetry = open_telemetry
        self.registry = CollectorRegistry()
        self.drift = DriftMonitor(reference)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        endpoint = ["endpoint"]
        labels = [*endpoint, "action", "decision"]
        self.requests = counter("latentguard_requests", "Requests.", [*endpoint, "status"])
        self.seconds = histogram(
            "latentguard_request_seconds", "Whole requests.", endpoint, buckets=SECONDS
        )
        self.verdicts = counter("latentguard_verdicts", "Verdicts.", [*labels, "guard"])
        self.reloads = counter("latentguard_reloads", "Guards and keys read anew.", ["outcome"])
        self.replies = counter("latentguard_replies", "Verdicts on replies.", labels)
        self.opinions = counter("latentguard_second_opinions", "Second opinions.", ["opinion"])
        self.shadow_verdicts = counter(
            "latentguard_shadow_verdicts",
            "Verdicts of the guard that decides, by what its shadow guard would have decided.",
            [*endpoint, "segment", "outcome", "decided_by"],
        )
        self.first_token = histogram(
            "latentguard_first_token_seconds",
            "Streamed chats, to the first event.",
            buckets=SECONDS,
        )
        self.waits = histogram("latentguard_queue_seconds", "Waiting for a batch.", buckets=SECONDS)
        self.batches = histogram(
            "latentguard_batch_prompts", "Prompts scored together.", buckets=SIZES
        )
        buckets = tuple(self.drift.edges) or (0.0,)
        self.scores = histogram("latentguard_score", "Scores.", buckets=buckets)
        drift = Gauge(
            "latentguard_score_drift",
            "Population stability index of recent scores against the reference.",
            registry=self.registry,
        )
        drift.set_function(lambda: self.drift.index)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Show a number that is asked for when Prometheus looks."""
        Gauge(f"latentguard_{name}", what, registry=self.registry).set_function(value)
        if self.open_telemetry is not None:
            self.open_telemetry.gauge(name, what, value)

    def batch(self, waits: Sequence[float]) -> None:
        """Note a batch, and how long each of its prompts had waited."""
        self.batches.observe(len(waits))
        for wait in waits:
            self.waits.observe(wait)

    def verdict(
        self,
        endpoint: str,
        action: str,
        scored: ScoredPrompt | None = None,
        *,
        guard: str = DEFAULT_NAME,
    ) -> None:
        """Count what was done, and the verdict if there is one.

        Args:
            endpoint: That was asked.
            action: What was done.
            scored: The verdict.
            guard: The name of its guard; scores of the default one are compared with known ones.
        """
        decision = scored.verdict.decision if scored else "none"
        self.verdicts.labels(endpoint, action, decision, guard).inc()
        if self.open_telemetry is not None:
            self.open_telemetry.verdict(endpoint, action, scored, guard=guard)
        if scored is None or guard != DEFAULT_NAME:
            return
        verdict = scored.verdict
        self.scores.observe(verdict.score)
        if scored.readings == 1 and not verdict.evidence:
            self.drift.add(verdict.score)  # the greatest of several has no reference

    def reply(self, endpoint: str, action: str, decision: str) -> None:
        """Count what was done with a reply."""
        self.replies.labels(endpoint, action, decision).inc()

    def opinion(self, opinion: str) -> None:
        """Count a second opinion."""
        self.opinions.labels(opinion).inc()

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
