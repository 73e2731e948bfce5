"""The backbone's residual streams on disk: what a cache is, writing one, and batches from one."""
