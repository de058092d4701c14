"""The report of a calibration: thresholds, the reliability figure, quadrants."""

from __future__ import annotations

from dataclasses import asdict

from latentguard.calibration import Calibration
from latentguard.errors import GuardError
from latentguard.guard import LatentGuard
from latentguard.plots import reliability_figure
from latentguard.quadrants import Quadrants
from latentguard.report import Report, Section


def calibration_report(guard: LatentGuard) -> Report:
    """What a calibration found, as a page.

    Raises:
        GuardError: if the guard is not calibrated.
    """
    calibration, quadrants = guard.part(Calibration), guard.part(Quadrants)
    if calibration is None:
        raise GuardError("The guard is not calibrated; run 'latentguard calibrate' first.")
    thresholds, *chances = calibration.tables()
    sections = [Section("Thresholds", f"{guard.promise}.".capitalize(), (thresholds,))]
    if calibration.reliability is not None:
        figure = reliability_figure(calibration.reliability)
        sections.append(Section("Probabilities", "", (figure, *chances)))
    if quadrants is not None and quadrants.shares:
        sections.append(Section("Quadrants", "", tuple(quadrants.tables())))
    meta = {"fingerprint": asdict(guard.fingerprint), "fitted": guard.fitted}
    title = f"Calibration of the guard for {guard.fingerprint.model}"
    return Report(title, tuple(sections), meta)
