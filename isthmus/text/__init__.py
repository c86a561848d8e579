"""Prompts in numbers: a small encoder that is trained here, or any frozen one of transformers."""
