"""Training objectives: the rollout of a head against the backbone, and next-token prediction."""
