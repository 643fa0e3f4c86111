"""Backbones, heads and weight files."""
