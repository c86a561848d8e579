"""Names that the plan, the work and the tables of the study of SRDD share. This file imports nothing heavy."""

MODES = ("none", "simple", "masked")
"""Ways to refine a draw."""

TAUGHT, UNTAUGHT = "taught", "untaught"
WEIGHTS = {TAUGHT: 1.0, UNTAUGHT: 0.0}
"""`distillation_weight` of both students, which start from the same weights of the teacher."""

DRAWING = "drawing"
"""The experiment that times draws of teacher and student."""

HOLES = ("centre", "random")
FACTORS = (2, 4)
HOLE_PSNR = "PSNR in the hole, dB"
"""Edits: kinds of holes, factors of super-resolution, and what is measured of both."""


def jump_words(number: int) -> str:
    """How often scales were drawn again, for the name of a row.

    >>> jump_words(0), jump_words(1), jump_words(2)
    ('drawn', 'drawn, 1 jump', 'drawn, 2 jumps')
    """
    return "drawn" if not number else f"drawn, {number} jump{'s' if number > 1 else ''}"
