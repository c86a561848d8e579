"""Published weights to Isthmus models: read without running code, renamed key by key, loaded strictly."""
