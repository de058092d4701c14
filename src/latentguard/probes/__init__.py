"""Directions, axes and probes: from states to scores."""
