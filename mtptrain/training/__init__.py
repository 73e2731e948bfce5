"""The training loop, its checkpoints and the engines that hold a head's parameters."""
