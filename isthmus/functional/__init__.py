"""The mathematics as pure functions on tensors; no weights."""
