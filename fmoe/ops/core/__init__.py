"""What declares operators and runs them: their rules, tapes for recomputation, modes and named axes."""
