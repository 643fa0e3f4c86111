"""Checkpoints of the published programs of AdaShare, DynaShare, AutoMTL and efficient computation sharing.

Each reader returns a :class:`taps.networks.published.result.Published` network: a base in this library's names, and what each task
changes of it. Names and orders of tensors were read in the programs; outputs were compared with theirs on random weights
(``docs/published.md``).
"""
