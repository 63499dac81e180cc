"""Training as functions of values: optimizers, schedules, gradients, data, metrics, plots, checkpoints."""
