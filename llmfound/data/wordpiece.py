"""WordPiece as BERT's authors wrote it, on the `tokenizers` library."""

import collections
import functools
import itertools
import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmfound.data.text import _up_to_the_last, read_lines
from llmfound.data.tokenizers import Tokenizer, _as_texts, _to_learn_from

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of every WordPiece trained here
_FILES = "tokenizer.json", "vocab.txt"
_CONFIG, _ADDED, _SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_NAMES = {"lowercase": "do_lower_case", "strip_accents": "strip_accents", "split_chinese": "tokenize_chinese_chars"}
_CUT = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}  # of BERT's; Japanese ones differ
_CHINESE = "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))  # fmt: skip


class WordPiece(Tokenizer):
    """BERT's tokenizer: words and punctuation apart, each cut into the longest pieces that the vocabulary has.

    Control characters are dropped, Chinese characters stand alone, and if `lowercase`, case and accents are dropped. A
    word is cut from the left, pieces after the first begin with "##", and a word that cannot be cut whole is [UNK]. A
    "[MASK]" that is written in a text, or another of the five special pieces, is cut like other text; other tokens that
    a file has added to its vocabulary, such as "[E1]" before an entity, are found as it says. Source: Devlin et al.
    2019, section 3; Schuster and Nakajima 2012, section 3; the authors' code.

    What `from_vocabulary`, `train`, and `load` of a vocab.txt make does as the authors' code on this Python, but for
    the newest characters: those that Python does not know yet are lower-cased as the `tokenizers` library has them, and
    those that its decomposition does not know (U+11938 of Unicode 13) stay whole. A tokenizer.json of someone else does
    what it says. The usual one is further from the authors': it drops private characters, has older tables of accents,
    punctuation and control characters, no final sigma, misses 256 Chinese characters (U+2B820 to U+2B91F), and makes
    words of more than 100 characters [UNK].

    Args:
        json_text: str, the content of a tokenizer.json with a WordPiece model.

    Attributes:
        pad_id, unk_id, cls_id, sep_id, mask_id: int; start_id is cls_id, and end_id is sep_id.
        continues: bool (vocab_size,), True for the pieces that go on with a word ("##").

    Raises:
        ValueError: if the text is no such file, or the vocabulary lacks one of [PAD], [UNK], [CLS], [SEP], [MASK].
    """

    _usual_names = {"pad": ["[PAD]"], "unk": ["[UNK]"], "start": ["[CLS]"], "end": ["[SEP]"], "mask": ["[MASK]"]}

    def __init__(self, json_text):
        super().__init__(json_text)
        kind = type(self._tokenizer.model).__name__
        if kind != "WordPiece":
            raise ValueError(f"This tokenizer.json has a {kind} model, not WordPiece; Tokenizer.load reads it.")
        ids = {piece: self._tokenizer.token_to_id(piece) for piece in PIECES}
        _check_complete([piece for piece, i in ids.items() if i is not None], self.vocab_size)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        self.start_id, self.end_id = self.cls_id, self.sep_id
        self._special_ids |= set(ids.values())

    @functools.cached_property
    def continues(self):
        prefix = self._tokenizer.model.continuing_subword_prefix
        return np.array([piece.startswith(prefix) for piece in self.vocabulary])

    @classmethod
    def from_vocabulary(
        cls, pieces, lowercase=True, strip_accents=None, split_chinese=True, max_input_chars_per_word=200
    ):
        """A tokenizer from the pieces by their ids.

        Args:
            pieces: iterable of str.
            lowercase: whether case is dropped; it must be what the vocabulary was made with.
            strip_accents: whether accents are dropped; None does as `lowercase` says.
            split_chinese: whether Chinese characters stand alone.
            max_input_chars_per_word: int, a longer word is [UNK]; 200 in the authors' code, 100 in `transformers`.

        Raises:
            ValueError: if a piece is no str, empty, holds a line break, or is there twice, or one of the special ones
                is missing.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, processors

        ids = _vocabulary(pieces)
        fast = Fast(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=max_input_chars_per_word))
        fast.normalizer, fast.pre_tokenizer = _stages(lowercase, strip_accents, split_chinese)
        ends = (("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        fast.post_processor = processors.BertProcessing(*ends)  # for other readers of the file
        fast.decoder = decoders.WordPiece(cleanup=False)
        fast.add_special_tokens(list(PIECES))
        return cls(fast.to_str(pretty=True))

    @classmethod
    def train(cls, texts, vocab_size, lowercase=True, min_frequency=2):
        """Learns a vocabulary from texts, the same one every time.

        Args:
            texts: iterable of str.
            vocab_size: int, at most so many pieces, the special ones included.
            lowercase: whether case and accents are dropped.
            min_frequency: int, how often a pair of pieces must occur to be merged.

        Returns:
            A WordPiece with [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the characters, those that go on with a
            word, and the merged pieces, the most frequent pair first.

        Raises:
            ValueError: if there is no text, or `vocab_size` is too small for the characters of the texts.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, trainers

        texts = _to_learn_from(texts)

        def learned(size, special):
            fast = Fast(models.WordPiece(unk_token="[UNK]"))
            fast.normalizer, fast.pre_tokenizer = _stages(lowercase, None, True)
            trainer = trainers.WordPieceTrainer(
                vocab_size=size, min_frequency=min_frequency, special_tokens=special, show_progress=False
            )
            fast.train_from_iterator(texts, trainer)
            ids = fast.get_vocab()
            return sorted(ids, key=ids.get)

        # The library decides between pairs of one frequency by their ids, and gives ids to "##" characters by chance.
        characters = sorted(learned(0, []), key=lambda piece: (len(piece), piece))
        if not characters:
            raise ValueError(f"There is nothing to learn from: {len(texts)} texts of spaces and control characters.")
        if len(PIECES) + len(characters) > vocab_size:
            raise ValueError(
                f"vocab_size ({vocab_size}) is too small for {len(PIECES)} special pieces and {len(characters)} "
                "characters."
            )
        return cls.from_vocabulary(learned(vocab_size, [*PIECES, *characters]), lowercase)

    @classmethod
    def load(cls, path, lowercase=None, strip_accents=None, split_chinese=None, max_input_chars_per_word=None):
        """Reads a vocab.txt, a tokenizer.json, or a checkpoint's folder that has one of them.

        Of a folder's two, tokenizer.json is read. A vocab.txt does not say what was done about case: you do, or the
        tokenizer_config.json beside it, or else it is taken for cased if a word of it has a capital letter. The tokens
        that an added_tokens.json or tokenizer_config.json beside it have added go on where it ends.

        Args:
            path: file or folder.
            lowercase, strip_accents, split_chinese, max_input_chars_per_word: as in `from_vocabulary`, for a vocab.txt;
                None as above. What a tokenizer.json does cannot be changed, but is checked against them.

        Raises:
            FileNotFoundError: if there is no such file, or the folder has neither.
            ValueError: if it is no such file, or a tokenizer.json does otherwise than you ask for, or than the
                tokenizer_config.json of its folder says (by which `transformers` would go), or added tokens do not go
                on with the vocabulary.
        """
        path = Path(path)
        in_folder = path.is_dir()
        path = _file_in(path) if in_folder else path
        given = dict(lowercase=lowercase, strip_accents=strip_accents, split_chinese=split_chinese,
                     max_input_chars_per_word=max_input_chars_per_word)  # fmt: skip
        if path.suffix != ".json":
            return cls._load_vocabulary(path, given)
        tokenizer = cls(Tokenizer.load(path).to_json())
        tokenizer._check_settings(path, given, "got")
        if in_folder:
            right = f"; load {' or '.join(_FILES)} by its own path, whichever is right"
            tokenizer._check_settings(path, _configured(path.parent), f"{_CONFIG} beside it says", right)
        return tokenizer

    @classmethod
    def _load_vocabulary(cls, path, given):
        config = _object(path.parent / _CONFIG)
        others = {name: config.get(name) for name, usual in _CUT.items() if config.get(name) not in (None, usual)}
        if others:
            warnings.warn(
                f"{path.parent / _CONFIG} has {others}, and texts are cut at spaces and punctuation here: the pieces "
                "will be others than those of its model. Cut texts as it says, join the words with spaces, and load "
                "this vocabulary with split_chinese=False.",
                stacklevel=3,
            )
        pieces = _up_to_the_last(read_lines(path))
        words = (piece.removeprefix("##") for piece in pieces)
        settings = dict(lowercase=not any(word.isalpha() and word != word.lower() for word in words))
        for told in (_configured(path.parent), given):
            settings |= {name: value for name, value in told.items() if value is not None}
        try:
            tokenizer = cls.from_vocabulary(pieces, **settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return tokenizer._extended(path.parent)

    def _extended(self, folder):
        """With the tokens that the folder's added_tokens.json and tokenizer_config.json have added to the vocabulary.

        tokenizer_config.json tells how they are found in texts, or else whether they are among the special ones. Such
        special ones as the vocabulary itself has are found, too.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        config = _object(folder / _CONFIG)
        fast = Fast.from_str(self._json)
        try:
            decoder = (config.get("added_tokens_decoder") or {}).items()
            numbers = {entry["content"]: int(i) for i, entry in decoder}
            told = {entry.pop("content"): entry for _, entry in decoder}
            lists = (found.get("additional_special_tokens") for found in (config, _object(folder / _SPECIAL)))
            special = itertools.chain.from_iterable(tokens or () for tokens in lists)
            special = {token["content"] if isinstance(token, dict) else token for token in special}
            ids = {token: fast.token_to_id(token) for token in special} | numbers | _object(folder / _ADDED)
            ids = {token: i for token, i in ids.items() if i is not None and token not in PIECES}
            if not ids:
                return self
            for token in sorted(ids, key=ids.get):
                usual = {"special": token in special, "normalized": token not in special}
                fast.add_tokens([AddedToken(token, **told.get(token, usual))])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} has no added tokens as transformers writes them: {error!r}.") from error
        wrong = {token: i for token, i in ids.items() if fast.token_to_id(token) != i}
        if wrong:
            raise ValueError(
                f"{folder}: added tokens must go on with the vocabulary, from id {self.vocab_size}; got "
                f"{str(wrong)[:200]}."
            )
        return type(self)(fast.to_str(pretty=True))

    def _check_settings(self, path, settings, source, remedy=""):
        for name, value in settings.items():
            if value is not None and value != self._settings[name]:
                raise ValueError(f"{path} does {name}={self._settings[name]}; {source} {name}={value}{remedy}.")

    @functools.cached_property
    def _settings(self):
        """What is done about case, accents, Chinese and long words, whoever wrote the file."""
        return {
            "lowercase": self._words("A") == ["a"],
            "strip_accents": self._words("é") == ["e"],
            "split_chinese": len(self._words("北京")) == 2,
            "max_input_chars_per_word": self._tokenizer.model.max_input_chars_per_word,
        }

    def _words(self, text):
        """The words of a text, list of str: what is cut into pieces."""
        normalizer, split = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if split is None else [word for word, _ in split.pre_tokenize_str(text)]

    def save_folder(self, folder, max_length=512):
        """Writes tokenizer.json, vocab.txt, tokenizer_config.json and special_tokens_map.json for a checkpoint.

        The AutoTokenizer of `transformers` gives the same ids for every text, with [CLS] and [SEP] added, but finds
        special pieces that are written in it. Its BertTokenizer takes the vocabulary alone and does as said above.
        Files of the same names are replaced, where they are links to others' the links alone, and an added_tokens.json,
        which would add to this vocabulary what it has not, is removed.

        Args:
            folder: path, made if it is not there.
            max_length: int, how many positions the model has.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {f"{piece[1:-1].lower()}_token": piece for piece in PIECES}
        config = {theirs: self._settings[ours] for ours, theirs in _NAMES.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **names}
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        contents = {"tokenizer.json": self._json, "vocab.txt": "".join(f"{piece}\n" for piece in self.vocabulary)}
        for name, content in ((_CONFIG, config), (_SPECIAL, names)):
            contents[name] = json.dumps(content, indent=2, sort_keys=True) + "\n"
        for name, content in contents.items():
            (folder / f"{name}.part").write_text(content, "utf-8", newline="\n")
            os.replace(folder / f"{name}.part", folder / name)
        (folder / _ADDED).unlink(missing_ok=True)

    def encode_words(self, words):
        """The ids of the pieces of each word of a text that is split already: list of lists of int.

        A word that is nothing but characters that are dropped has none.
        """
        return self.encode_batch(words)

    def encode_with_offsets(self, text):
        """The ids of one text, and where their pieces stand in it: list of int, and list of (start, end) characters."""
        return self.encode_batch_with_offsets([text])[0]

    def encode_batch_with_offsets(self, texts):
        """`encode_with_offsets` of many texts: list of (ids, offsets)."""
        return [(row.ids, row.offsets) for row in self._encodings(texts, self._tokenizer.encode_batch)]

    def __reduce__(self):
        return type(self), (self._json,)

    def __repr__(self):
        settings = ", ".join(f"{name}={value}" for name, value in self._settings.items())
        return f"WordPiece(vocab_size={self.vocab_size}, {settings})"


def _vocabulary(pieces):
    """The ids of the pieces, dict, if they can be a vocabulary."""
    if isinstance(pieces, Mapping):
        raise ValueError("pieces must stand in the order of their ids; of a dict, pass sorted(ids, key=ids.get).")
    ids = {}
    for i, piece in enumerate(_as_texts(pieces, "pieces")):
        if not piece or "\n" in piece or piece in ids:
            fault = f"is piece {ids[piece]} too" if piece in ids else "holds a line break" if piece else "is empty"
            raise ValueError(f"Piece {i}, {piece!r}, {fault}.")
        ids[piece] = i
    _check_complete(ids, len(ids))
    return ids


def _check_complete(pieces, size):
    missing = [piece for piece in PIECES if piece not in pieces]
    if missing:
        raise ValueError(f"The vocabulary of {size} pieces lacks {', '.join(missing)}.")


@functools.lru_cache
def _stages(lowercase, strip_accents, split_chinese):
    """The authors' normalization and split, of the library's parts."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    category = _categories()
    steps = [normalizers.Replace(Regex(rf"[{category['Cc']}{category['Cf']}\x{{FFFD}}&&[^\t\n\r]]"), "")]
    if lowercase:
        # Python's lower(): the library has each character by itself.
        letter, ignored = r"[\p{Cased}&&[^\p{Case_Ignorable}]]", r"\p{Case_Ignorable}*+"
        steps += [
            normalizers.Replace(Regex(rf"{letter}{ignored}\KΣ(?!{ignored}{letter})"), "ς"),
            normalizers.Lowercase(),
        ]
    if lowercase if strip_accents is None else strip_accents:
        steps += [normalizers.NFD(), normalizers.Replace(Regex(f"[{category['Mn']}]"), "")]
    apart = r"!-/:-@\[-`{-~" + "".join(ranges for name, ranges in category.items() if name.startswith("P"))
    alone = Regex(f"[{apart}{_CHINESE if split_chinese else ''}]")
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(alone, "isolated")]
    return normalizers.Sequence(steps), pre_tokenizers.Sequence(split)


@functools.lru_cache
def _categories():
    """The characters of each category of Python's Unicode, as ranges in a regular expression."""
    found = collections.defaultdict(str)
    for category, run in itertools.groupby(range(sys.maxunicode + 1), lambda i: unicodedata.category(chr(i))):
        first, *rest = run
        found[category] += f"\\x{{{first:X}}}-\\x{{{rest[-1] if rest else first:X}}}"
    return found


def _configured(folder):
    """What the tokenizer_config.json of a folder says, as our arguments; None for what it does not tell."""
    found = _object(folder / _CONFIG)
    return {ours: found.get(theirs) for ours, theirs in _NAMES.items()}


def _object(path):
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(found)[:40]}.")
    return found


def _file_in(folder):
    names = sorted(path.name for path in folder.iterdir())
    found = [folder / name for name in _FILES if name in names]
    if not found:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(_FILES)}, but {listed}.")
    return found[0]
