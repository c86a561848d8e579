"""The whole story in one command: `isthmus demo`."""
