"""The stream cache of `+recipe=collect`: the backbone's residual streams on disk, and batches from them."""
