"""Schedulers: which step reads which tokens at which time, and how a state moves on."""
