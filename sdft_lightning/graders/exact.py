"""`exact`: the completion is the answer and nothing else."""

from sdft_lightning.graders.accepted import accepted_texts
from sdft_lightning.graders.folding import fold_text


def exact(text: str, reference: object) -> float:
    """Return 1.0 if `text` equals an accepted text, else 0.0.

    Both sides are stripped, white space and case are folded, and one full stop at the end is
    dropped. Markdown stays: "**Paris**" is not "Paris".

    Args:
        text: the completion.
        reference: a str, or a list of accepted str.

    Raises:
        ValueError: the reference has another form.
    """
    accepted = {_bare(answer) for answer in accepted_texts(reference)}
    return float(_bare(text) in accepted)


def _bare(text: str) -> str:
    return fold_text(text).removesuffix(".").rstrip()
