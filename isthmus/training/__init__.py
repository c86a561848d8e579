"""Training a tokenizer or a prior: objectives, optimisation, the loops, checkpoints."""
