"""What users call: image tokenizer, transformer and settings as one folder."""
