"""Measuring and reporting: metrics, evaluation, and the report that is built from a run's JSON."""
