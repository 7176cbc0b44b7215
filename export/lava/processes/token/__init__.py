"""Halting score, token gate and the synaptic reduction that merges tokens."""
