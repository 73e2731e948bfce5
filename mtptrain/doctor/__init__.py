"""What is wrong with a head: its tensors, its wiring."""
