"""What speculative decoding and training would cost, from shapes and data sheets. Nothing here imports torch."""
