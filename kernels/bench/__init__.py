"""Times every op beside its peers, after checking that it is right: `python -m mtptrain.kernels.bench`."""
