"""Acceptance of a head on given texts, for every draft length, without a decoding loop."""
