"""Infrastructure of every run: processes, folders, files, provenance, progress and tracking."""
