"""Image source, readout and spike probe."""
