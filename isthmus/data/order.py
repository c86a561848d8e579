"""Which image stands at which position of an endless training run: a pure function of (seed, position)."""

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError
from isthmus.functional.draws import ORDER, stream

_EPOCHS, _ROTATIONS, _MEMBERS = 0, 1, 2


class SampleOrder:
    """Position (0, 1, 2, ...) to (image index, visit): `visit` counts how often that image was seen before.

    Unbalanced: every epoch is a fresh permutation of all images. Balanced: each block of C positions holds every class
    once, in a shuffled rotation, and each class walks through its own images epoch by epoch. The last permutations are
    kept, so walking forward is quick, and any position can be asked for at any time.
    """

    def __init__(self, labels: Int[np.ndarray, " n"], *, seed: int, balanced: bool) -> None:
        """`labels` (N,) int: balanced orders draw the classes that occur in it equally often."""
        self.seed = seed
        self.num_images = len(labels)
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)] if balanced else []
        self._kept: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def locate(self, positions: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """(B,) positions to (B,) indices and (B,) visits, int64."""
        if len(positions) and positions.min() < 0:
            raise UserError(f"Positions count from 0, got {positions.min()}.")
        one = self._locate_balanced if self._members else self._locate_in_epoch
        pairs = [one(int(position)) for position in positions]
        indices, visits = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return indices, visits

    def _locate_in_epoch(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_images)
        return int(self._permutation(_EPOCHS, 0, epoch, self.num_images)[place]), epoch

    def _locate_balanced(self, position: int) -> tuple[int, int]:
        num_classes = len(self._members)
        block, slot = divmod(position, num_classes)
        # Rotations are made in groups: one random stream per block would cost more than the lookup.
        group_size = max(1, 4096 // num_classes)
        group, row = divmod(block, group_size)
        rotations = self._rotations(group, group_size, num_classes)
        chosen = int(rotations[row, slot])
        members = self._members[chosen]
        # A class stands in every block exactly once, so the block number counts its visits.
        visit, place = divmod(block, len(members))
        return int(members[self._permutation(_MEMBERS, chosen, visit, len(members))[place]]), visit

    def _rotations(self, group: int, group_size: int, num_classes: int) -> np.ndarray:
        kept = self._kept.get((_ROTATIONS, 0))
        if kept is None or kept[0] != group:
            table = np.tile(np.arange(num_classes), (group_size, 1))
            kept = (group, stream(self.seed, ORDER, _ROTATIONS, group).permuted(table, axis=1))
            self._kept[_ROTATIONS, 0] = kept
        return kept[1]

    def _permutation(self, purpose: int, member: int, epoch: int, length: int) -> np.ndarray:
        kept = self._kept.get((purpose, member))
        if kept is None or kept[0] != epoch:
            kept = (epoch, stream(self.seed, ORDER, purpose, member, epoch).permutation(length))
            self._kept[purpose, member] = kept
        return kept[1]
