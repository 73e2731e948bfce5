"""The backbone's residual streams on disk: the cache's manifest and format, its writer, and batches from it."""
