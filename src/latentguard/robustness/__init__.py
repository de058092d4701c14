"""Robustness: how well a guard works when texts or weights are changed on purpose."""
