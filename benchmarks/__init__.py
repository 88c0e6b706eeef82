"""Triptych against the reference library, on the same weights and machine: `python -m benchmarks`."""
