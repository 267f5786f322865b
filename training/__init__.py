"""Training: config, loss, optimizer, state, step, loop, evaluation."""
