"""Measuring samples on frozen features."""
