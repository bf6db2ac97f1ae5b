"""Training on one rank: model, sharding, loss, step, checkpoint. Knows nothing of Ray or of planning."""
