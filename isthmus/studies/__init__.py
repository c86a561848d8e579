"""Scripted experiments whose tables put the papers' claims beside what was measured here."""
