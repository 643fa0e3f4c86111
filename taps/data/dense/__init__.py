"""Dense benchmarks: images labelled with maps."""
