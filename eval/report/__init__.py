"""From results to claims, tables, plots and the page: `python -m eval.report RUN...`."""
