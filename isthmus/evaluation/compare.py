"""One table of several evaluations that were measured in the same way; others are refused."""

from collections.abc import Sequence
from pathlib import Path

from isthmus.errors import UserError
from isthmus.evaluation.protocol import EvaluationRecord, read_record, same_protocol
from isthmus.evaluation.report import joined, markdown_table, number, sampling_words, with_spread


def compare(folders: Sequence[Path]) -> str:
    """Markdown: a row per score, a column per evaluation.

    Raises:
        UserError: fewer than two evaluations, one cannot be read, or two were measured in different ways; the message
            says in what.
    """
    if len(folders) < 2:
        raise UserError(f"a comparison needs at least two evaluations, got {len(folders)}. Pass their folders.")
    records = [read_record(folder) for folder in folders]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        differences = same_protocol(records[0], record)
        if differences:
            raise UserError(
                f"{folders[0]} and {folder} were measured in different ways, so their scores do not compare: "
                f"{'; '.join(differences)}. Evaluate one of them again in the way of the other."
            )
    return joined(
        [
            "# Comparison",
            _protocol(records[0]),
            markdown_table(("", *_column_names(folders)), _subject_rows(records)),
            markdown_table(("score", "better", *_column_names(folders), "floor", "ceiling"), _score_rows(records)),
            "Uncertainty: [95 % interval] of a mean over images, else +- deviation between chunks of samples. "
            "Likelihoods are those of tokens: they compare only between models on one image tokenizer.",
        ]
    )


def _protocol(record: EvaluationRecord) -> str:
    protocol = record.protocol
    return (
        f"N = {protocol.num_samples} samples each ({protocol.balance}), n = {protocol.chunk_images} per measurement, "
        f"features {protocol.features}, {protocol.image_size} px, reference: {protocol.reference}."
    )


def _column_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their whole paths where names repeat."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _subject_rows(records: Sequence[EvaluationRecord]) -> list[tuple[str, ...]]:
    facts = {
        "model": [record.subject.name for record in records],
        "kind": [record.subject.kind for record in records],
        "seed": [str(record.subject.seed) for record in records],
        "sampling": [sampling_words(record.subject) for record in records],
        "warnings": [str(len(record.warnings)) for record in records],
    }
    return [(name, *values) for name, values in facts.items()]


def _score_rows(records: Sequence[EvaluationRecord]) -> list[tuple[str, ...]]:
    """Scores that any evaluation has, in the order of the first that has them."""
    names = dict.fromkeys(score.name for record in records for score in (*record.scores, *record.held_out))
    rows = []
    for name in names:
        found = [record.score(name) for record in records]
        first = next(score for score in found if score is not None)
        cells = ["" if score is None else with_spread(score) for score in found]
        rows.append((name, first.better, *cells, number(first.floor), number(first.ceiling)))
    return rows
