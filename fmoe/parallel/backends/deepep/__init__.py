"""Tokens over DeepEP's kernels, of either of its two generations."""
