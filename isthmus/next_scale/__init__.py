"""The next-scale family: VAR, SRDD and its imports, from the pyramid of tokens to pictures and trainings."""
