"""Parts of the scheduling benchmarks: one trunk with many schedulers, replays, quality of decisions, speed, plots."""
