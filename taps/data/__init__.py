"""Readers of image folders, dense benchmarks, hospital stays and volumes, and generators of data with the same layouts."""
