"""Losses, metrics and costs."""
