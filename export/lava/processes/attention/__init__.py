"""Spiking self-attention by fast weights."""
