"""``python -m fmoe bench``: the cost of a layer and of a training step on this machine."""
