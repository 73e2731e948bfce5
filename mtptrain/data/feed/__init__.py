"""Text that is read, tokenised and mixed while training goes on: `data.streaming` and `data.mixture`."""
