"""Whether an evaluation's figures count: the output is the backbone's own and replay counts what decoding does."""
