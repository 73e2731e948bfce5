"""Prompts and the backbone's own continuations: the texts that heads are measured and trained on."""
