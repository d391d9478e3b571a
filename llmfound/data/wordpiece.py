"""WordPiece as BERT's authors wrote it, on the `tokenizers` library."""

import functools
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np

from llmfound.data.text import read_lines
from llmfound.data.tokenizers import Tokenizer

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of every WordPiece trained here
_FILES = "tokenizer.json", "vocab.txt"
_SETTINGS = {"lowercase": "do_lower_case", "strip_accents": "strip_accents", "split_chinese": "tokenize_chinese_chars"}
_LONGEST = 200  # characters of a word; a longer one is [UNK]


class WordPiece(Tokenizer):
    """BERT's tokenizer: words and punctuation apart, each cut into the longest pieces that the vocabulary has.

    Control characters are dropped, Chinese characters stand alone, and if `lowercase`, case and accents are dropped. A
    word is cut from the left, pieces after the first begin with "##", and a word that cannot be cut whole is [UNK]. The
    Unicode tables are Python's, as in the authors' code; of all assigned characters, four (U+166D, U+1734, U+111C9,
    U+11938) are treated as the tables of the `tokenizers` library have them. A capital sigma that ends a word becomes
    a final one, but not behind an accent. Source: Devlin et al. 2019, section 3; Schuster and Nakajima 2012, section 3;
    the authors' code.

    This takes twice the time of the library's own BertNormalizer, which `load` leaves in a tokenizer.json that has it.

    Args:
        json_text: str, the content of a tokenizer.json with a WordPiece model.

    Attributes:
        pad_id, unk_id, cls_id, sep_id, mask_id: int; start_id is cls_id, and end_id is sep_id.
        continues: bool (vocab_size,), True for the pieces that go on with a word ("##").

    Raises:
        ValueError: if the text is no such file, or the vocabulary lacks one of [PAD], [UNK], [CLS], [SEP], [MASK].
    """

    def __init__(self, json_text, pad=None, start=None, end=None, unk=None):
        super().__init__(json_text, pad, start, end, unk)
        kind = json.loads(json_text)["model"].get("type", "WordPiece")
        if kind != "WordPiece":
            raise ValueError(f"This tokenizer.json has a {kind} model, not WordPiece; Tokenizer.load reads it.")
        ids = {piece: self._tokenizer.token_to_id(piece) for piece in PIECES}
        missing = [piece for piece, i in ids.items() if i is None]
        if missing:
            raise ValueError(f"The vocabulary of {self.vocab_size} pieces lacks {', '.join(missing)}.")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        self.start_id, self.end_id = self.cls_id, self.sep_id
        self._special_ids = set(ids.values())

    @functools.cached_property
    def continues(self):
        return np.array([piece.startswith("##") for piece in self.vocabulary])

    @classmethod
    def from_vocabulary(cls, pieces, lowercase=True, strip_accents=None, split_chinese=True):
        """A tokenizer from the pieces by their ids.

        Args:
            pieces: sequence of str.
            lowercase: whether case is dropped; it must be what the vocabulary was made with.
            strip_accents: whether accents are dropped; None does as `lowercase` says.
            split_chinese: whether Chinese characters stand alone.

        Raises:
            ValueError: if a piece is empty or there twice, or one of the special ones is missing.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models

        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        if "" in vocabulary or len(vocabulary) < len(pieces):
            i = next(i for i, piece in enumerate(pieces) if not piece or vocabulary[piece] != i)
            raise ValueError(f"Piece {i}, {pieces[i]!r}, is {'there twice' if pieces[i] else 'empty'}.")
        missing = [piece for piece in PIECES if piece not in vocabulary]
        if missing:
            raise ValueError(f"The vocabulary of {len(pieces)} pieces lacks {', '.join(missing)}.")
        fast = Fast(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_LONGEST))
        fast.normalizer, fast.pre_tokenizer = _stages(lowercase, strip_accents, split_chinese)
        fast.decoder = decoders.WordPiece(cleanup=False)
        fast.add_special_tokens(list(PIECES))
        return cls(fast.to_str(pretty=True))

    @classmethod
    def train(cls, texts, vocab_size, lowercase=True, min_frequency=2):
        """Learns a vocabulary from texts.

        Args:
            texts: iterable of str.
            vocab_size: int, at most so many pieces, the special ones included.
            lowercase: whether case and accents are dropped.
            min_frequency: int, how often a pair of pieces must occur to be merged.

        Returns:
            A WordPiece with [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4 and the other pieces in alphabetical order of
            first the characters, then the merged ones, by when they were merged. The library breaks ties among pairs
            by chance, so keep the file.

        Raises:
            ValueError: if there is no text, or `vocab_size` is too small for the characters of the texts.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, trainers

        if isinstance(texts, str):
            raise ValueError(f"texts must be an iterable of str; got one str, {texts[:40]!r}.")
        fast = Fast(models.WordPiece(unk_token="[UNK]"))
        fast.normalizer, fast.pre_tokenizer = _stages(lowercase, None, True)
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
                                            special_tokens=list(PIECES))  # fmt: skip
        fast.train_from_iterator(texts, trainer)
        ids = fast.get_vocab()
        if len(ids) <= len(PIECES):
            raise ValueError("There is no text to train on.")
        if len(ids) > vocab_size:
            raise ValueError(f"vocab_size ({vocab_size}) is too small: characters alone are {len(ids)} pieces.")
        return cls.from_vocabulary(sorted(ids, key=ids.get), lowercase)

    @classmethod
    def load(cls, path, lowercase=None, strip_accents=None, split_chinese=None):
        """Reads a vocab.txt, a tokenizer.json, or a checkpoint's folder that has one of them.

        Of a folder's two, tokenizer.json wins. A vocab.txt does not say what was done about case: the
        tokenizer_config.json beside it does, or you, or else it is taken for cased if any piece has a capital letter.

        Args:
            path: file or folder.
            lowercase, strip_accents, split_chinese: as in `from_vocabulary`, for a vocab.txt; None as above.

        Raises:
            FileNotFoundError: if there is no such file, or the folder has neither.
            ValueError: if it is no such file, or a tokenizer.json was made with another `lowercase`.
        """
        path, given = Path(path), dict(lowercase=lowercase, strip_accents=strip_accents, split_chinese=split_chinese)
        if path.is_dir():
            found = [path / name for name in _FILES if (path / name).exists()]
            if not found:
                raise FileNotFoundError(f"{path} has neither {' nor '.join(_FILES)}, but {_listed(path)}.")
            path = found[0]
        if path.suffix == ".json":
            return cls._load_json(path, given)
        pieces = read_lines(path)
        config = path.parent / "tokenizer_config.json"
        known = _json(config) if config.exists() else {}
        settings = {ours: known.get(theirs) if given[ours] is None else given[ours]
                    for ours, theirs in _SETTINGS.items()}  # fmt: skip
        if settings["lowercase"] is None:
            special = set(PIECES) | {piece for piece in pieces if piece.startswith("[unused")}
            settings["lowercase"] = not any(piece != piece.lower() for piece in pieces if piece not in special)
        if settings["split_chinese"] is None:
            settings["split_chinese"] = True
        return cls.from_vocabulary(pieces, **settings)

    @classmethod
    def _load_json(cls, path, given):
        found = super().load(path)
        for name, value in given.items():
            if value is not None and value != found._settings[name]:
                raise ValueError(f"{path} was made with {name}={found._settings[name]}; got {name}={value}.")
        return found

    @functools.cached_property
    def _settings(self):
        """What was done about case, accents and Chinese characters: of ours or of the library's BertNormalizer."""
        normalizer = json.loads(self._json).get("normalizer") or {}
        steps = normalizer.get("normalizers", [normalizer])
        bert = next((step for step in steps if step.get("type") == "BertNormalizer"), {})
        lowercase = bert.get("lowercase", any(step.get("type") == "Lowercase" for step in steps))
        strip = bert.get("strip_accents")
        return dict(lowercase=lowercase, strip_accents=lowercase if strip is None else strip,
                    split_chinese=bert.get("handle_chinese_chars", False))  # fmt: skip

    def save_folder(self, folder):
        """Writes tokenizer.json, vocab.txt, tokenizer_config.json and special_tokens_map.json for a checkpoint.

        `transformers` reads them; its own tokenizer drops private characters, has [UNK] for words of more than 100
        letters, and other tables than Python's.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in self.vocabulary), "utf-8", newline="\n")
        names = {f"{piece[1:-1].lower()}_token": piece for piece in PIECES}
        config = {theirs: self._settings[ours] for ours, theirs in _SETTINGS.items()}
        config |= {"tokenizer_class": "BertTokenizer", "model_max_length": 512, **names}
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")

    def encode_words(self, words):
        """The ids of the pieces of each word of a text that is split already: list of lists of int.

        A word that is nothing but characters that are dropped has none.
        """
        words = list(words)
        return self.encode_batch(words) if words else []

    def encode_with_offsets(self, text):
        """The ids of one text, and where their pieces stand in it: list of int, and list of (start, end) characters."""
        return self.encode_batch_with_offsets([text])[0]

    def encode_batch_with_offsets(self, texts):
        """`encode_with_offsets` of many texts: list of (ids, offsets)."""
        return [(row.ids, row.offsets) for row in self._encodings(texts, self._tokenizer.encode_batch)]


@functools.lru_cache
def _stages(lowercase, strip_accents, split_chinese):
    """The authors' normalization and split, of the library's parts: what its BertNormalizer has otherwise, mended."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    strip_accents = lowercase if strip_accents is None else strip_accents
    categories = _characters_by_category()
    kept = set("\t\n\r")
    dropped = {c for c in (*categories["Cc"], *categories["Cf"], "\0", "\ufffd") if c not in kept}
    steps = [
        normalizers.Replace(Regex(_one_of(dropped)), ""),
        normalizers.Replace(Regex(_one_of({*categories["Zs"], *kept})), " "),
    ]
    if lowercase:
        steps.append(normalizers.Replace(Regex(r"(?<=\p{L})Σ(?![\p{L}\p{M}])"), "ς"))
    steps.append(normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=split_chinese,
                                            strip_accents=strip_accents, lowercase=lowercase))  # fmt: skip
    if strip_accents:
        steps += [normalizers.NFD(), normalizers.Replace(Regex(_one_of(categories["Mn"])), "")]
    apart = {c for name, found in categories.items() if name.startswith("P") for c in found}
    if split_chinese:
        apart |= set(map(chr, range(0x2B820, 0x2B920)))  # of extension E, which the library leaves out
    split = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(_one_of(apart)), "isolated")]
    return normalizers.Sequence(steps), pre_tokenizers.Sequence(split)


@functools.lru_cache
def _characters_by_category():
    found = {}
    for i in range(sys.maxunicode + 1):
        found.setdefault(unicodedata.category(chr(i)), []).append(chr(i))
    return found


def _one_of(characters):
    """A regular expression for one of these characters, as ranges."""
    ranges = []
    for i in sorted(map(ord, characters)):
        if ranges and i == ranges[-1][1] + 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    return "[" + "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges) + "]"


def _json(path):
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(found)[:40]}.")
    return found


def _listed(folder):
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
