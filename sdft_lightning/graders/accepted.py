"""The reference form that `contains` and `exact` share: the texts that count as right."""

from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import shown
from sdft_lightning.graders.folding import fold_text

_FORM = "the reference must be a text, or a list of accepted texts"
_REMEDY = (
    'Write the answer as text, such as "48" or ["Paris", "the city of Paris"], '
    "and leave out rows that have none."
)


def accepted_texts(reference: object) -> list[str]:
    """Return the accepted texts of `reference`, as they were written.

    Args:
        reference: a str, or a list of str. Each holds more than white space and full stops.

    Raises:
        UserError: another form, an empty list or an empty text (which every completion would
            contain).
    """
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list | tuple) or not texts:
        raise UserError(f"{_FORM}; got {shown(reference)}. {_REMEDY}")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{_FORM}; got {shown(text)} in {shown(reference)}. {_REMEDY}")
        if not fold_text(text).strip(". "):
            raise UserError(f"{_FORM}; got the empty text {shown(text)}. {_REMEDY}")
    return list(texts)
