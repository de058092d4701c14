"""Robustness: what a guard keeps of its quality when text or weights are changed on purpose."""
