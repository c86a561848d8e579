"""Leaves that several networks share: draws, attention, filters, distances between images."""
