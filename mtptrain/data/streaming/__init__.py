"""Text read lazily, exact on any number of processes and workers."""
