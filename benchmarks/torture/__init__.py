"""Faults, floods and forgeries on purpose: `python -m benchmarks.torture`."""
