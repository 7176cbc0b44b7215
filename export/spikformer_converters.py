"""Converters of atsnn's own modules."""
