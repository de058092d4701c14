"""latentguard inside other tools; each module needs that tool installed."""
