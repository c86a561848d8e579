"""Loops that draw tokens and yield a `GenerationStep` each."""
