"""Relays (delays, gated messages, changes of layout) and sums."""
