"""Side-by-side measurements. Each is run as `python -m benchmarks.NAME` and ends in one JSON line."""
