"""Numbers in words, for messages and tables."""


def number_of(number: int, noun: str) -> str:
    """So many, in words.

    >>> number_of(1, "layer"), number_of(2, "batch")
    ('1 layer', '2 batches')
    """
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"
