"""Timing of every op beside its peers, after a check of its results: `python -m mtptrain.kernels.bench`."""
