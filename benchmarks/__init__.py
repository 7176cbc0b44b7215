"""Side-by-side timings against peers, one command each: `python -m benchmarks.<name> [--json]`."""
