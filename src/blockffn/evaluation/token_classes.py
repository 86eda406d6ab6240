"""What kind of token each id of a vocabulary is, by its own text alone: a word at the beginning of a line counts as a
continuation, because its token has no space.
"""

from __future__ import annotations

import keyword

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from blockffn.data.tokenizer import SPACE

CLASSES = (
    "digits",
    "punctuation",
    "white space",
    "single letters",
    "function words",
    "programming keywords",
    "capitalised words",
    "other word starts",
    "continuations",
    "mixed",
    "byte fragments",
    "special",
)
_FUNCTION_WORDS = frozenset(
    word
    for line in (
        "a an the this that these those and or but nor so yet if then than as of at by for from in into on onto to",
        "with without about after before over under between through up down out off i me my mine we us our you your",
        "he him his she her it its they them their who whom whose which what is am are was were be been being do does",
        "did have has had will would shall should can could may might must not no there here when where while because",
    )
    for word in line.split()
)
_KEYWORDS = frozenset((*keyword.kwlist, "self", "int", "void", "char", "const", "static", "struct"))


def token_classes(tokenizer: PreTrainedTokenizerBase, size: int) -> NDArray[np.int64]:
    """`[size]`: index into `CLASSES` of each id; ids without a token are `special`."""
    classes = np.full(size, CLASSES.index("special"), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index < size and index not in tokenizer.all_special_ids:
            classes[index] = CLASSES.index(class_of(_text(tokenizer, token, index)))
    return classes


def class_of(text: str) -> str:
    """The class of a token's text; a word's first token begins with a space."""
    bare = text.strip()
    if "\ufffd" in text:
        return "byte fragments"
    if not bare:
        return "white space"
    if bare.isdigit():
        return "digits"
    if not any(one.isalnum() for one in bare):
        return "punctuation"
    if not bare.isalpha():
        return "mixed"
    begins = text[0].isspace()
    if begins and bare.lower() in _FUNCTION_WORDS:
        return "function words"
    if bare in _KEYWORDS and (begins or len(bare) > 2):
        return "programming keywords"
    if len(bare) == 1:
        return "single letters"
    if not begins:
        return "continuations"
    return "capitalised words" if bare[0].isupper() else "other word starts"


def _text(tokenizer: PreTrainedTokenizerBase, token: str, index: int) -> str:
    """The token's text with its leading space, which decoding a single SentencePiece token would drop."""
    if token.startswith(SPACE):
        return token.replace(SPACE, " ")
    return str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
