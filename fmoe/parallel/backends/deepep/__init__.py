"""Tokens over DeepEP's kernels, by either of its two generations."""
