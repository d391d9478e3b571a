"""Text as words with marks for capitals and repetition, as ULMFiT reads it. Source: Howard and Ruder 2018, section 4.1,
and the authors' code, whose names of the marks these are."""

import collections
import html
import re
import unicodedata

from llmfound.data.tokenizers import SPECIAL_PIECES, Tokenizer, _as_texts

MARKS = ("xxmaj", "xxup", "xxrep", "xxwrep")  # ids 4 to 7 of every WordTokenizer with marks
_MARKUP = re.compile(r"<\s*br\s*/?\s*>", re.I)
_REMAINS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": ".", " #39;": "'", "&#39;": "'", "#39;": "'", "\\n": "\n", "\\$": "$",
            '\\"': '"', "<unk>": "[UNK]"}  # fmt: skip
_REPEATED = re.compile(r"(\S)\1{3,}")


def _patterns(letters, end):
    """What finds words that are repeated, and words: expressions of one word, and of where it ends or has not begun."""
    repeated = re.compile(rf"(?<!{end})({letters})((?:[ \t]+\1(?!{end})){{3,}})")
    word = re.compile(
        r"\[UNK\]"
        r"|(?:[^\W\d_](?:\.[^\W\d_])+(?![^\W\d_])\.?)"  # U.S.A.
        r"|[^\W\d_]+(?=n['’]t\b)|n['’]t\b"  # do|n't
        r"|['’](?:s|m|d|re|ve|ll)\b"  # it|'s
        rf"|{letters}(?:-{letters})*"  # words, numbers, well-known
        r"|\.{2,}|-{2,}"
        r"|[^\w\s]"
        r"|\n",
        re.I,
    )
    return repeated, word


# Vowel signs, accents of their own and joiners, which are none of Python's \w.
_SIGNS = {"\u200c", "\u200d", *(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")}
_WITHIN = rf"[\w{''.join(sorted(_SIGNS))}]"
_PLAIN, _SIGNED = _patterns(r"\w+", r"\w"), _patterns(rf"\w{_WITHIN}*", _WITHIN)


def words(text):
    """The words of a text, list of str: lower case, each piece of punctuation by itself, with marks.

    xxmaj stands before a word that began with a capital, xxup before one all in capitals (neither before I or A),
    "xxrep 4 !" for !!!!, and "xxwrep 4 very" for the same word four times over. HTML's line breaks and entities become
    what they stand for, and so do the traces of tokenization that some data have (" @-@ ", " #39;").

    Args:
        text: str.
    """
    text = html.unescape(_MARKUP.sub("\n", text))
    for found, meant in _REMAINS.items():
        text = text.replace(found, meant)
    repeated, word_of = _PLAIN if _SIGNS.isdisjoint(text) else _SIGNED  # the plain ones are faster
    text = repeated.sub(lambda m: f" xxwrep {1 + len(m[2].split())} {m[1]} ", text)
    text = _REPEATED.sub(lambda m: f" xxrep {len(m[0])} {m[1]} ", text)
    found = []
    for word in word_of.findall(text):
        if word == "[UNK]":
            found.append(word)
        elif len(word) > 1 and word.isupper() and any(map(str.isalpha, word)):
            found += ["xxup", word.lower()]
        elif len(word) > 1 and word[0].isupper() and word[1:] == word[1:].lower():
            found += ["xxmaj", word.lower()]
        else:
            found.append("xxnl" if word == "\n" else word.lower())
    return found


class WordTokenizer(Tokenizer):
    """Whole words, lower case, with marks for what that loses: the vocabulary of a word-level language model.

    `words` says what a word is. What is not in the vocabulary is [UNK]. A tokenizer of `marks=False` takes what white
    space separates, as it stands, for texts that are tokenized already, such as WikiText.
    Source: Howard and Ruder 2018, section 4.1.

    Args:
        json_text: str, the content of a file that `save` wrote.

    Attributes:
        marks: bool.
        vocab_size: int. [PAD] is 0, [START] 1, [END] 2 and [UNK] 3.

    Raises:
        ValueError: if the text is no such file.
    """

    def __init__(self, json_text, pad=None, start=None, end=None, unk=None):
        super().__init__(json_text, pad, start, end, unk)
        # A text that is marked already has them as words among others; none has these four as its most frequent ones.
        self.marks = [self._tokenizer.token_to_id(mark) for mark in MARKS] == [4, 5, 6, 7]

    @classmethod
    def train(cls, texts, vocab_size=60_000, min_frequency=2, marks=True):
        """Takes the most frequent words of some texts.

        Args:
            texts: iterable of str.
            vocab_size: int, at most so many words, the special ones included; 60,000 in the authors' code.
            min_frequency: int, how often a word must occur.
            marks: whether texts are lower-cased and marked, see `words`; else only split at white space.

        Raises:
            ValueError: if there is no text, `vocab_size` leaves no room for words, or no word is frequent enough.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, pre_tokenizers

        special = [*SPECIAL_PIECES, *MARKS * marks]
        if vocab_size <= len(special):
            raise ValueError(f"vocab_size ({vocab_size}) must be more than the {len(special)} special words.")
        counts = collections.Counter()
        for text in _as_texts(texts):
            counts.update(words(text) if marks else text.split())
        frequent = [word for word, n in counts.items() if n >= min_frequency and word not in special]
        if not frequent:
            raise ValueError(f"No word occurs min_frequency ({min_frequency}) times; lower it, or give more text.")
        frequent = sorted(frequent, key=lambda word: (-counts[word], word))[: vocab_size - len(special)]
        fast = Fast(models.WordLevel({word: i for i, word in enumerate([*special, *frequent])}, unk_token="[UNK]"))
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast.add_special_tokens(list(SPECIAL_PIECES))
        return cls(fast.to_str(pretty=True))

    def encode_batch(self, texts):
        cut = [words(text) if self.marks else text.split() for text in _as_texts(texts)]
        return super().encode_batch([" ".join("[UNK]" if w in SPECIAL_PIECES else w for w in row) for row in cut])

    def pieces(self, text):
        """As `Tokenizer.pieces`; of a tokenizer with marks, what `words` makes of the text."""
        return words(text) if self.marks else super().pieces(text)

    def decode_batch(self, rows, unknown=None):
        """As `Tokenizer.decode_batch`; marks are carried out, and spaces left out where English has none."""
        texts = super().decode_batch(rows, unknown)
        return [_unmarked(text.split()) for text in texts] if self.marks else texts


def _unmarked(found):
    """The text of some words with marks. A mark that lacks what it belongs to is left out."""
    out, change, i = [], None, 0
    while i < len(found):
        word, i = found[i], i + 1
        if word in ("xxmaj", "xxup"):
            change = str.capitalize if word == "xxmaj" else str.upper
            continue
        if word in ("xxrep", "xxwrep"):
            if i + 1 < len(found) and found[i].isdecimal():
                times, repeated, i = min(int(found[i]), 100), found[i + 1], i + 2
                out += ["".join([repeated] * times)] if word == "xxrep" else [repeated] * times
            continue
        word = "\n" if word == "xxnl" else word
        out.append(change(word) if change else word)
        change = None
    text = " ".join(out)
    text = re.sub(r" ([.,;:!?%)\]}]+|n['’]t|['’](?:s|m|d|re|ve|ll)|\.{2,})(?=\s|$)", r"\1", text)
    return re.sub(r"([(\[{]) | ?(\n) ?", r"\1\2", text)
