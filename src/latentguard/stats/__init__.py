"""Statistics: figures of detection quality, intervals, finite-sample bounds."""
