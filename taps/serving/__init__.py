"""One address for many tasks: images come in over HTTP, replicas of one model answer them in common batches."""
