"""Names that a run puts on the timeline of a trace, and that reading the trace looks for."""

STEP_MARK = "train"
"""A training step, from its dispatch on: a jax.profiler.StepTraceAnnotation with its number."""

INPUT_MARK = "input"
"""The host takes the next batch and sends it to the devices."""
