"""Tokenizer: text to piece ids and back, on the `tokenizers` library; reads and writes its tokenizer.json."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmfound.data.text import read_lines

SPECIAL_PIECES = ("[PAD]", "[START]", "[END]", "[UNK]")  # ids 0 to 3 of every tokenizer trained here

# The names that published tokenizers use, the likelier first.
_USUAL_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<PAD>"),
    "start": ("[START]", "<s>", "[BOS]", "<bos>", "<|startoftext|>", "[CLS]"),
    "end": ("[END]", "</s>", "[EOS]", "<eos>", "<|endoftext|>", "[SEP]"),
    "unk": ("[UNK]", "<unk>", "<|unk|>", "<UNK>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>", "<MASK>"),
}
_ROLES = "pad", "start", "end", "unk"

_ENGLISH_ENDING = r"['’](?i:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])"
_WORDS = "|".join(
    (
        _ENGLISH_ENDING,  # it|'s, don|'t
        rf"[ \-]?[\p{{L}}\p{{M}}]+(?!{_ENGLISH_ENDING})['’](?=\p{{L}})",  # French elisions: l'|homme, qu'|il
        r"[ \-]?[\p{L}\p{M}]+",  # a word with the space or hyphen before it: a|-t|-il
        r" ?\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # punctuation, with the space that French sets before ? and !
        r"\s+(?!\S)",  # spaces, all but the one that belongs to the next word
        r"\s+",
    )
)


class Tokenizer:
    """Cuts text into pieces of a fixed vocabulary and joins them again.

    `encode` adds no special ids, and cuts a "[END]" that is written in a text like other text, and so all special
    pieces below and "[MASK]", whatever they are called. Other tokens that a file has added to its vocabulary are found
    in texts as it says. Start and end are added by the batches.

    Args:
        json_text: str, the content of a tokenizer.json of the `tokenizers` library.
        pad: id or piece that fills short rows. None looks for the usual names ([PAD], <pad>, ...).
        start: id or piece before a target sentence; None as above ([START], <s>, [CLS], ...).
        end: id or piece after a sentence; None as above ([END], </s>, <|endoftext|>, [SEP], ...).
        unk: id or piece for what the vocabulary lacks; None as above ([UNK], <unk>, ...).

    Attributes:
        vocab_size: int, the largest id + 1, which is the size an embedding needs even if ids have gaps.
        pad_id, start_id, end_id, unk_id: int, or None if the vocabulary has no such piece.

    Raises:
        ValueError: if the text is no tokenizer.json, or a special piece that was asked for is not in it.
    """

    _usual_names = _USUAL_NAMES

    def __init__(self, json_text, pad=None, start=None, end=None, unk=None):
        try:
            self._tokenizer = _fast(json_text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"This is not a tokenizer.json: {error}; it begins with {str(json_text)[:40]!r}."
            ) from error
        self._json = json_text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.pad_id = self._special_id("pad", pad)
        self.start_id = self._special_id("start", start)
        self.end_id = self._special_id("end", end)
        self.unk_id = self._special_id("unk", unk)
        stages = json.loads(json_text)
        roles = {self.pad_id, self.start_id, self.end_id, self.unk_id} - {None}
        usual = map(self._tokenizer.token_to_id, itertools.chain.from_iterable(self._usual_names.values()))
        self._special_ids = roles | self._read_as_text(roles.union(usual), stages)
        byte_level = '"ByteLevel"' in json.dumps([stages.get("pre_tokenizer"), stages.get("decoder")])
        self._byte_of = _byte_characters() if byte_level else None

    @classmethod
    def train(cls, texts, vocab_size, kind="bpe", lowercase=False, min_frequency=2):
        """Learns a vocabulary from text.

        bpe and unigram work on UTF-8 bytes, so any text can be encoded and decode(encode(text)) is text in NFC. bpe:
        Sennrich, Haddow, Birch 2016, section 3.2; unigram: Kudo 2018, section 3.2; wordpiece: Schuster, Nakajima 2012,
        section 3, in the form of BERT (words and punctuation apart, spaces not kept, unknown words become [UNK]).
        word: the most frequent whole words, all others [UNK], as in Bahdanau, Cho, Bengio 2015, section 4.1. A word has
        the space before it in its piece, so " house" and the "house" of "(house" are two, and decode(encode(text)) is
        text in NFC if no word is unknown.
        bpe and word learn the same pieces every time; the library's other trainers break ties by chance, so keep the
        file.

        Args:
            texts: iterable of str, for translation usually the sentences of both languages.
            vocab_size: int, at most so many pieces, the 4 special ones included. A small text may yield fewer.
            kind: "bpe", "wordpiece", "unigram" or "word".
            lowercase: whether case is dropped.
            min_frequency: int, how often a pair of pieces must occur to be merged (bpe and wordpiece), or a word to be
                in the vocabulary (word).

        Returns:
            A Tokenizer with [PAD] 0, [START] 1, [END] 2, [UNK] 3.

        Raises:
            ValueError: if there is no text, `kind` is unknown, `vocab_size` is too small for the alphabet, or no word
                is frequent enough.
        """
        texts = _to_learn_from(texts)
        tokenizer, trainer = _blank(kind, vocab_size, lowercase, min_frequency)
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(
                f"vocab_size ({vocab_size}) is too small for the special pieces and the alphabet; "
                f"use more than {tokenizer.get_vocab_size()}."
            )
        if kind == "word" and tokenizer.get_vocab_size() == len(SPECIAL_PIECES):
            raise ValueError(f"No word occurs min_frequency ({min_frequency}) times; lower it, or give more text.")
        return cls(tokenizer.to_str(pretty=True))

    @classmethod
    def train_from_files(cls, paths, vocab_size, **options):
        """The same from UTF-8 text files (plain, .gz, .xz or .bz2), one sentence a line.

        Args:
            paths: iterable of paths, or one path.
            vocab_size: int, as in `train`.
            **options: the other arguments of `train`.
        """
        paths = [paths] if isinstance(paths, (str, Path)) else paths
        return cls.train((line for path in paths for line in read_lines(path)), vocab_size, **options)

    @classmethod
    def load(cls, path, pad=None, start=None, end=None, unk=None):
        """Reads any tokenizer.json; the special pieces are those of the constructor."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no tokenizer.json: it is not UTF-8 text ({error}).") from error
        return cls(text, pad, start, end, unk)

    def save(self, path):
        """Writes the tokenizer.json. Special pieces that were given by hand must be given again to `load`."""
        Path(path).write_text(self._json, encoding="utf-8", newline="\n")

    def to_json(self):
        """The content of the tokenizer.json, str; `Tokenizer(json_text)` reads it back."""
        return self._json

    @property
    def vocabulary(self):
        """The pieces by their ids, list of str; an id without a piece has the empty one."""
        pieces = [""] * self.vocab_size
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            pieces[i] = piece
        return pieces

    def encode(self, text):
        """The ids of the pieces of one text, list of int, without start and end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The ids of many texts, list of lists of int.

        Raises:
            ValueError: if something is not str, or holds half a surrogate pair, which no UTF-8 text can; or if a text
                has a piece that the vocabulary lacks, and there is no piece for unknown ones either.
        """
        return [row.ids for row in self._encodings(texts, self._tokenizer.encode_batch_fast)]

    def pieces(self, text):
        """The words, or parts of words, of a text as they are written in it, one for each id of `encode(text)`.

        Unlike `tokens`, this shows what [UNK] stands for, and the text's own case and accents.

        Args:
            text: str.

        Returns:
            list of str, without the space before a word; a piece that is this space alone is "". If a character was
            cut into several pieces (bytes of bpe and unigram), it stands in each of them.

        Raises:
            ValueError: as `encode_batch`.
        """
        [row] = self._encodings([text], self._tokenizer.encode_batch)
        spans, blank = row.offsets, [token == self._written(" ") for token in row.tokens]
        if row.ids[:1] == [self.unk_id] and len(spans) > 1 and spans[0][1] > spans[1][0]:
            blank[0] = True  # the space that stands before every text, which has the place of the first character
        return ["" if is_blank else text[a:b].removeprefix(" ") for is_blank, (a, b) in zip(blank, spans)]

    def _encodings(self, texts, encode):
        texts = list(_as_texts(texts))
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"These texts cannot be encoded: {error}. A vocabulary that lacks some pieces needs one for unknown "
                f"ones; this one has unk_id {self.unk_id}."
            ) from error

    def decode(self, ids):
        """The text of a sequence of ids, str; special ids are skipped wherever they stand."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows, unknown=None):
        """The texts of many sequences of ids, list of str; special ids are skipped.

        Args:
            rows: list of sequences of int, or an int array (batch, length).
            unknown: for each row a list of str, what is written for its unk_ids, in turn: each as a word, with a space
                before it, but none after an elision (l') or before a hyphen. None skips them, too.

        Raises:
            ValueError: if an id is outside the vocabulary, or a row has another number of unk_ids than of words for
                them.
        """
        rows = [self._checked(ids) for ids in rows]
        if unknown is None:
            kept = [[i for i in ids if i not in self._special_ids] for ids in rows]
            return self._tokenizer.decode_batch(kept, skip_special_tokens=True)
        counts = [ids.count(self.unk_id) for ids in rows]
        if counts != [len(words) for words in unknown]:
            raise ValueError(f"unknown must have a word for each unk_id; the rows have {counts}, got {unknown}.")
        return [self._decode_with(ids, words) for ids, words in zip(rows, unknown)]

    def _decode_with(self, ids, words):
        """The text of ids, with the words in place of the unk_ids: written as pieces, and joined by the decoder."""
        words, pieces, decoder = iter(words), [], self._tokenizer.decoder
        join = " ".join if decoder is None else decoder.decode
        space = "" if join(["a", "b"]) == "a b" else " "
        for i in ids:
            if i == self.unk_id:
                word = next(words)
                after_elision = pieces and re.search(r"[^\W\d_]['’]$", self._readable(pieces[-1]))
                glued = not pieces or after_elision or word.startswith("-")
                pieces += [self._written(word if glued else space + word)] if word else []
            elif i not in self._special_ids:
                pieces.append(self._tokenizer.id_to_token(i))
        return join([piece for piece in pieces if piece is not None])

    def tokens(self, ids):
        """The pieces as one reads them, list of str: "▁" marks a space, a byte of a cut character shows as \\xc3."""
        return [self._readable(self._tokenizer.id_to_token(i)) for i in self._checked(ids)]

    def _readable(self, piece):
        if self._byte_of is not None and piece is not None and all(c in self._byte_of for c in piece):
            piece = bytes(self._byte_of[c] for c in piece).decode("utf-8", "backslashreplace")
        return str(piece).replace(" ", "▁")

    def _written(self, text):
        """The text as a piece of this vocabulary would be written: the inverse of `_readable`."""
        if self._byte_of is None:
            return text
        character = {byte: c for c, byte in self._byte_of.items()}
        return "".join(character[byte] for byte in text.encode("utf-8"))

    def _checked(self, ids):
        array = np.asarray(ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.vocab_size:
            raise ValueError(
                f"ids must be a sequence of integers from 0 to {self.vocab_size - 1}; got shape {array.shape}, "
                f"dtype {array.dtype}, {array.min()} to {array.max()}."
            )
        return array.tolist()

    def _read_as_text(self, roles, stages):
        """Has the added tokens of these ids read as ordinary text, and the others found; the ids of the special ones.

        The library can only have all special tokens read as text, so others are none for it.
        """
        added = [(token, self._tokenizer.token_to_id(token["content"])) for token in stages.get("added_tokens") or ()]
        special = {i for token, i in added if token["special"]}
        if special != roles & {i for _, i in added}:
            for token, i in added:
                token["special"] = i in roles
            self._tokenizer = _fast(json.dumps(stages))
        return special

    def _special_id(self, role, given):
        if given is None:
            ids = (self._tokenizer.token_to_id(name) for name in self._usual_names[role])
            return next((i for i in ids if i is not None), None)
        found = self._tokenizer.token_to_id(given) if isinstance(given, str) else int(given)
        if found is None or not 0 <= found < self.vocab_size:
            raise ValueError(f"{role} ({given!r}) is not in this vocabulary of {self.vocab_size} pieces.")
        return found

    def __reduce__(self):  # the library's own pickle forgets encode_special_tokens
        return type(self), (self._json, self.pad_id, self.start_id, self.end_id, self.unk_id)

    def __repr__(self):
        ids = ", ".join(f"{role}_id={getattr(self, role + '_id')}" for role in _ROLES)
        return f"Tokenizer(vocab_size={self.vocab_size}, {ids})"


def _fast(json_text):
    """A tokenizers.Tokenizer that reads special tokens as text, and leaves it to batches to cut and to fill rows."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json_text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _blank(kind, vocab_size, lowercase, min_frequency):
    """An untrained tokenizers.Tokenizer and the trainer for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind not in ("bpe", "wordpiece", "unigram", "word"):
        raise ValueError(f'kind must be "bpe", "wordpiece", "unigram" or "word"; got {kind!r}.')
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    minimum = len(SPECIAL_PIECES) + {"wordpiece": 1, "word": 0}.get(kind, len(alphabet))
    if vocab_size <= minimum:
        raise ValueError(f"vocab_size ({vocab_size}) must be more than {minimum} for kind {kind!r}.")
    common = dict(vocab_size=vocab_size, special_tokens=list(SPECIAL_PIECES), show_progress=False)
    clean = [normalizers.NFC()] + [normalizers.Lowercase()] * lowercase
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence(clean)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer, trainers.WordPieceTrainer(min_frequency=min_frequency, **common)
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(min_frequency=min_frequency, **common)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(min_frequency=min_frequency, initial_alphabet=alphabet, **common)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", initial_alphabet=alphabet, **common)
    # A space before the text, taken off again by the decoder: the first word has the pieces it has elsewhere.
    tokenizer.normalizer = normalizers.Sequence([*clean, normalizers.Prepend(" ")])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    if kind == "word":
        tokenizer.pre_tokenizer = words
        tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return tokenizer, trainer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer, trainer


def _byte_characters():
    """The byte that each character of a byte-level piece stands for.

    A printable byte is written as itself, the n-th of the others as the character 256 + n.
    Source: Radford et al. 2019, section 2.2, and the authors' code.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _is_text(text):
    """Whether this is a str that UTF-8 can hold: one without half a surrogate pair."""
    try:
        return isinstance(text, str) and text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _as_texts(texts, name="texts"):
    """Each of some texts, if it is one: a str that UTF-8 can hold."""
    _check_many(texts, name)
    for i, text in enumerate(texts):
        if not _is_text(text):
            raise ValueError(
                f"{name} must be an iterable of str without lone surrogates; got {repr(text)[:40]} as item {i}."
            )
        yield text


def _check_many(texts, name="texts"):
    """Raises ValueError if this is one str, or a table or a dict, whose iteration gives the names of its columns."""
    if isinstance(texts, str):
        raise ValueError(f"{name} must be an iterable of str; got one str, {texts[:40]!r}.")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        names = ", ".join(repr(found)[:40] for found in itertools.islice(texts, 3))
        raise ValueError(
            f"{name} must be an iterable of str; got a {type(texts).__name__}, whose iteration gives its names, "
            f"{names}. Pass a column of it, or for pairs of texts the zip of two."
        )


def _to_learn_from(texts):
    """The texts as a list, if not all are empty."""
    texts = list(_as_texts(texts))
    if not any(texts):
        raise ValueError(f"There is nothing to learn from: got {len(texts)} items, all empty.")
    return texts
