"""Text without a model: writing that is disguised, and cutting of long texts."""
