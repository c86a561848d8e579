"""What images are asked to be, in classes and in words, by calls of models of both families."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isthmus.errors import UserError
from isthmus.pipelines.labels import elements
from isthmus.text.encoders import TextFeatures


@dataclass(frozen=True)
class Asked:
    """What each image is to be.

    Attributes:
        class_labels: class ids, the null id for no class.
        texts: prompts, or what an encoder made of them; None for models that read no text.
        rows: which of the texts each image is of.
        negative_prompt: what guidance leads away from.
    """

    class_labels: list[int]
    texts: Sequence[str] | TextFeatures | None = None
    rows: Sequence[int] = ()
    negative_prompt: str = ""

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each image; None where there are no words to name."""
        if self.texts is None or isinstance(self.texts, TextFeatures):
            return None
        return [self.texts[row] for row in self.rows]

    def images(self, index: Sequence[int]) -> "Asked":
        """The same for some of the images, or for one several times."""
        rows = [] if self.texts is None else [self.rows[i] for i in index]
        return replace(self, class_labels=[self.class_labels[i] for i in index], rows=rows)


def prompt_list(prompt: object) -> list[str]:
    """Prompts as a list, whichever way they were given, None being the empty one; UserError for what is no text."""
    several = [prompt] if isinstance(prompt, str) else [""] if prompt is None else elements(prompt)
    if several is None or not all(isinstance(one, str) for one in several):
        raise UserError(f"a prompt is a text, or a list with one text per image, got {prompt!r}. Pass words.")
    return several


def number_of_texts(prompt: object, text: TextFeatures | None) -> list[None]:
    """As many entries as a call gives prompts, one where it gives none."""
    return [None] * (len(prompt_list(prompt)) if text is None else len(text))


def asked_for(class_ids: list[int], prompt: object, text: TextFeatures | None, negative_prompt: object = None) -> Asked:
    """Classes and texts side by side; a single one of either serves all. UserError where the numbers differ."""
    if prompt is not None and text is not None:
        raise UserError("text takes the place of prompt, got both. Pass one of them.")
    texts = prompt_list(prompt) if text is None else text
    if not class_ids or not len(texts):
        raise UserError("at least one class label and one prompt are needed, got an empty list. Pass None for none.")
    if text is not None and not bool(text.mask.any(dim=1).all()):
        raise UserError("at least one word of every text must count, got a mask that is False throughout. Mend text.")
    number = max(len(class_ids), len(texts))
    if not {len(class_ids), len(texts)} <= {1, number}:
        raise UserError(
            f"there must be as many prompts as class labels, or a single one of either, got {len(texts)} and "
            f"{len(class_ids)}. Pass one prompt per image."
        )
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise UserError(f"negative_prompt is one text for all images, got {negative_prompt!r}. Pass words.")
    ids = class_ids * number if len(class_ids) == 1 else class_ids
    rows = [0] * number if len(texts) == 1 else list(range(number))
    return Asked(ids, texts, rows, negative_prompt or "")
