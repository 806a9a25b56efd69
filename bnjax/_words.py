"""Counts with their noun, for messages and tables."""


def number_of(number: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is 1.

    >>> number_of(1, "layer"), number_of(2, "batch")
    ('1 layer', '2 batches')
    """
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"
