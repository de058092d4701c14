"""The paper's experiments, one module each, pure from records to tables."""
