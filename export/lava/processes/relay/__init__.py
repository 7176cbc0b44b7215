"""Relays: delays, shifts, gated messages and changes of layout."""
