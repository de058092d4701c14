"""``latentguard demo``: the whole job on a real model, ending in a report."""
