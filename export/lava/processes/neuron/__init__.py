"""LIF neurons with a gate for each token, and pooled neurons."""
