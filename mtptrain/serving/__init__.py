"""Acceptance in a running server: requests, counters, and their comparison with replay."""
