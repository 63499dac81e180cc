"""Models: trees of parameters and pure functions of them."""
