"""Lava processes and their models, for what Lava itself lacks.

One sub-package each, as in `lava.proc`, with `process.py` and `models.py` and nothing else: when
Lava compiles a network it executes every file beside the module that defines a process. Models use
numpy only: torch inside a model hangs, since Lava forks.
"""
