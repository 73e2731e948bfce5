"""The training loop, its checkpoints, and the engines that hold the parameters of a head."""
