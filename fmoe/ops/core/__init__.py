"""Operators: how they are declared and run, tapes for recomputation, modes and named axes."""
