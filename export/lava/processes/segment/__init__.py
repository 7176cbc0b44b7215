"""A part of a network (stem, block, head) at two grains."""
