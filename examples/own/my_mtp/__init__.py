"""A loss and a recipe of one's own, outside of mtptrain: see examples/README.md."""
