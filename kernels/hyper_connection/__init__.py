"""Hyper-connections around a sublayer; see `reference.py`."""

from mtptrain.kernels.hyper_connection.reference import expand_and_mix_reference as expand_and_mix

__all__ = ["expand_and_mix"]
