"""Images and labels: built-in sets, your own, the order in which training sees them, and token caches.

`opening.open_source` finds a set by its name; `batches` and `token_cache` are what training loops read from.
"""
