"""Generators of data with known properties, for demos and tests without downloads."""
