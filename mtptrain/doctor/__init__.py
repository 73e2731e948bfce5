"""Diagnosis of a head: faults of its tensors, and the wiring that it fits best."""
