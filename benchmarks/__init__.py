"""Side by side with peers, in one process, as ratios. `python -m benchmarks.engine --help`."""
