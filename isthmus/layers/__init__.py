"""Leaves with weights that several models share: attention, conditioning, convolution."""
