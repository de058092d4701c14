"""The study: what its experiments share, and the run that puts them together (``run``)."""
