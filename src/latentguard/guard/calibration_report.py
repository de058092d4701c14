"""The report of a calibration: thresholds, the reliability figure, quadrants."""

from __future__ import annotations

from dataclasses import asdict

from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reliability import Reliability
from latentguard.report.charts import HARMLESS, NEUTRAL, new_plot
from latentguard.report.document import Figure, Report, Section


def calibration_report(guard: LatentGuard) -> Report:
    """What a calibration found, as a page.

    Raises:
        GuardError: if the guard is not calibrated.
    """
    if guard.thresholds is None:
        raise GuardError("The guard is not calibrated; run 'latentguard calibrate' first.")
    thresholds, *probabilities = guard.thresholds.tables()
    sections = [Section("Thresholds", f"{guard.promise}.".capitalize(), (thresholds,))]
    if guard.thresholds.reliability is not None:
        figure = reliability_figure(guard.thresholds.reliability)
        sections.append(Section("Probabilities", "", (figure, *probabilities)))
    if guard.quadrants is not None and guard.quadrants.shares:
        sections.append(Section("Quadrants", "", tuple(guard.quadrants.tables())))
    meta = {"fingerprint": asdict(guard.fingerprint), "fitted": guard.fitted}
    title = f"Calibration of the guard for {guard.fingerprint.model}"
    return Report(title, tuple(sections), meta)


def reliability_figure(reliability: Reliability) -> Figure:
    """The share of harmful prompts against the probability that they were given."""
    plot = new_plot(xaxis_title="predicted probability", yaxis_title="share that is harmful")
    plot.update_layout(xaxis_range=[-0.02, 1.02], yaxis_range=[-0.02, 1.02])
    line = dict(color=NEUTRAL, dash="dot")
    plot.add_scatter(x=[0, 1], y=[0, 1], name="perfect", line=line, hoverinfo="skip", mode="lines")
    bins = reliability.bins
    error = dict(
        type="data",
        symmetric=False,
        array=[b.high - b.observed for b in bins],
        arrayminus=[b.observed - b.low for b in bins],
    )
    plot.add_scatter(
        x=[b.predicted for b in bins],
        y=[b.observed for b in bins],
        error_y=error,
        text=[f"n = {b.n}" for b in bins],
        name=reliability.method,
        mode="lines+markers",
        marker_color=HARMLESS,
    )
    caption = (
        f"Cross-fitted, {reliability.n[0]} harmful and {reliability.n[1]} harmless prompts, both "
        f"classes weighing the same; bars are 95 % Wilson intervals. Expected calibration error "
        f"{reliability.after}; before {reliability.before}; a perfect map would show "
        f"{reliability.floor:.3f}."
    )
    return Figure("Reliability", plot, caption)
