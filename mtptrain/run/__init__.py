"""What every run needs, whatever it computes: processes, folders, files, provenance, progress and tracking."""
