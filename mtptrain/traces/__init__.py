"""Prompts and the backbone's own continuations, on which every head is measured."""
