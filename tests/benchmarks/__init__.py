"""Benchmarks that write RESULTS.md: `python -m tests.benchmarks stream --help`, from the checkout's root."""
