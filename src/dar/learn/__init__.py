"""Learning from a batch: the update, its optimizers, what is kept between steps, checkpoints, ranks."""
