"""Text read lazily, with the same batches on any number of processes and workers."""
