"""The networks of the papers, and the frozen network that compares images."""
