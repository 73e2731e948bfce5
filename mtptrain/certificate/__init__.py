"""Checks that must pass before figures count: output equal to the backbone's own, and replay equal to decoding."""
