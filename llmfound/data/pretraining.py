"""What BERT is pre-trained on: documents as pairs of segments, some of their words hidden."""

import re
from pathlib import Path

import numpy as np

from llmfound.data.batching import Passes, _check_integers
from llmfound.data.streams import _CHUNK, _write_header
from llmfound.data.text import read_lines
from llmfound.data.tokenizers import _as_texts

_TRIES = 10  # to find another document
_FILES = "ids.npy", "sentences.npy", "documents.npy"


def read_documents(path):
    """Documents of a text file with one sentence a line and blank lines between documents; .gz, .xz and .bz2, too.

    Returns:
        list of lists of str, none of them empty.

    Raises:
        FileNotFoundError, ValueError: as `read_lines`; ValueError also if all lines are blank.
    """
    found = [[]]
    for line in read_lines(path):
        if line.strip():
            found[-1].append(line.strip())
        elif found[-1]:
            found.append([])
    if not found[0]:
        raise ValueError(f"{path} has no sentences.")
    return found if found[-1] else found[:-1]


def split_sentences(text):
    """Sentences of a text of a European language, by its punctuation: list of str.

    One ends at . ! or ?, and quotation marks or brackets behind it, before white space and a capital, a digit or an
    opening mark. "Mr. Darcy" is therefore cut; to tell pairs of segments from others that does not matter.
    """
    parts = re.split(r"(?<=[.!?])((?:\s?[\"'”’)\]])*)\s+(?=[\"'“‘(\[]?\s?[A-ZÀ-ÖØ-Þ0-9])", text.strip())
    joined = ["".join(pair) for pair in zip(parts[::2], [*parts[1::2], ""])]
    return [sentence.strip() for sentence in joined if sentence.strip()]


class Documents:
    """The ids of many documents and where their sentences begin, in memory or in files that are mapped into it.

    Args:
        ids: int (tokens,), of all sentences one after the other.
        sentences: int (sentences + 1,), where each begins among the ids, and the end.
        documents: int (documents + 1,), where each begins among the sentences, and the end.
    """

    def __init__(self, ids, sentences, documents):
        self.ids, self.sentences, self.documents = ids, sentences, documents

    @classmethod
    def encode(cls, documents, tokenizer):
        """The ids of documents, an iterable of iterables of str. Sentences and documents without pieces are left out.

        Raises:
            ValueError: if a document is one str, or there is no piece at all.
        """
        ids, lengths, counts = [], [], []
        for part, some, ends in _encoded(documents, tokenizer):
            ids.append(part)
            lengths += some
            counts += ends
        if not lengths:
            raise ValueError("There are no sentences.")
        starts = np.cumsum([0, *lengths])
        return cls(np.concatenate(ids), starts, np.cumsum([0, *counts]))

    @classmethod
    def open(cls, folder):
        """Those that `write_documents` has written, read when they are needed.

        Raises:
            FileNotFoundError: if the folder lacks one of the files.
        """
        return cls(*(np.load(Path(folder) / name, mmap_mode="r") for name in _FILES))

    def __len__(self):
        return len(self.documents) - 1


def write_documents(folder, documents, tokenizer):
    """Encodes documents once and writes them to files, with only a few in memory at a time.

    Args:
        folder: path; it must not exist, or be empty.
        documents: iterable of iterables of str, the sentences: generators will do.
        tokenizer: WordPiece, or any object with encode_batch.

    Returns:
        Documents, mapped.

    Raises:
        ValueError: if the folder holds something, or as `Documents.encode`. No file is left then.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: {sorted(path.name for path in folder.iterdir())[:5]}.")
    folder.mkdir(parents=True, exist_ok=True)
    count, lengths, counts, done = 0, [], [], False
    try:
        with open(folder / _FILES[0], "wb") as file:
            _write_header(file, 0)
            for ids, some, ends in _encoded(documents, tokenizer):
                file.write(ids.astype("<i4").tobytes())
                count, lengths, counts = count + len(ids), lengths + some, counts + ends
            file.seek(0)
            _write_header(file, count)
        if not count:
            raise ValueError("There are no sentences.")
        np.save(folder / _FILES[1], np.cumsum([0, *lengths]))
        np.save(folder / _FILES[2], np.cumsum([0, *counts]))
        done = True
    finally:
        for name in () if done else _FILES:
            (folder / name).unlink(missing_ok=True)
    return Documents.open(folder)


def _encoded(documents, tokenizer):
    """For some documents at a time: ids, int32 (tokens,), the lengths of sentences, and the sentences of documents."""
    sentences, counts = [], []

    def flush():
        rows, lengths, ends = tokenizer.encode_batch(sentences), [], []
        start = 0
        for count in counts:
            kept = [len(row) for row in rows[start : start + count] if len(row)]
            lengths += kept
            ends += [len(kept)] if kept else []
            start += count
        return np.array([i for row in rows for i in row], "int32"), lengths, ends

    for i, document in enumerate(documents):
        if isinstance(document, str):
            raise ValueError(f"A document must be sentences, an iterable of str; got one str, {document[:40]!r}.")
        before = len(sentences)
        sentences.extend(_as_texts(document, f"Document {i}"))
        counts.append(len(sentences) - before)
        if len(sentences) >= _CHUNK:
            yield flush()
            sentences, counts = [], []
    if sentences:
        yield flush()


def masked_lm(ids, groups, generator, mask_id, vocab_size, rate=0.15, max_predictions=20, shares=(0.8, 0.1, 0.1)):
    """Hides some tokens of a row, to be predicted.

    n = min(max_predictions, max(1, round(rate * tokens))) places, round to even; each becomes [MASK], stays, or becomes
    any id of the vocabulary with the given shares. Source: Devlin et al. 2019, section 3.1, task 1; the authors' code.

    Args:
        ids: int (tokens,), the row with its special tokens.
        groups: list of lists of int, the places that may be hidden, each group as a whole: single places, or those of a
            word's pieces. A group that would exceed n is passed over.
        generator: numpy.random.Generator.
        mask_id, vocab_size: int.
        rate: float, of all tokens.
        max_predictions: int.
        shares: of [MASK], of the same token, of any token.

    Returns:
        The row as the model sees it, int (tokens,); the places, int (n,), ascending; and what stood there, int (n,).
    """
    count = min(max_predictions, max(1, round(len(ids) * rate)))
    chosen = []
    for i in generator.permutation(len(groups)):
        if len(chosen) >= count:
            break
        if len(chosen) + len(groups[i]) <= count:
            chosen += groups[i]
    places = np.sort(np.array(chosen, int))
    kind = generator.random(len(places))
    seen = ids.copy()
    seen[places[kind < shares[0]]] = mask_id
    anything = places[kind >= shares[0] + shares[1]]
    seen[anything] = generator.integers(vocab_size, size=len(anything))
    return seen, places, ids[places]


def left_to_right(ids, max_predictions=None):
    """Nothing is hidden, and every token but the last is asked for the next: the objective of a causal model.

    Source: Devlin et al. 2019, table 5, "LTR". Returns: as `masked_lm`.
    """
    places = np.arange(len(ids) - 1)[:max_predictions]
    return ids, places, ids[places + 1]


class PretrainingBatches(Passes):
    """Pairs of segments with hidden words, as batches of one shape for BERTPretraining.

    Segments A and B are runs of sentences. B follows A in its document or, half the time, begins at a random sentence
    of another one; the sentences that then remain are used again. Both together are max_length - 3 tokens long, or with
    probability `short_rate` anything from 2 on; longer ones lose tokens at random ends. The row is [CLS] A [SEP] B
    [SEP], filled up on the right. Source: Devlin et al. 2019, appendix A.2; the authors' code.

    Rows are a function of (seed, epoch, row) alone, the same on every backend, and a row is made when it is asked for.
    Every pass has as many as the first: what drawing gives more is left out, what it lacks is drawn again.

    Args:
        documents: Documents, or an iterable of iterables of str, the sentences.
        tokenizer: WordPiece, or any object with encode_batch, vocab_size, pad_id, cls_id, sep_id, mask_id and, for
            whole words, continues.
        batch_size: int, rows; the last batch of a pass may have fewer.
        max_length: int, tokens of a row.
        objective: "masked", or "left_to_right": no word is hidden, and every token is asked for the next.
        next_sentence: whether rows are pairs; else they are one segment, [CLS] A [SEP], and have no such label.
        whole_word: whether the pieces of a word are hidden together.
        masking: "dynamic": pairs and hidden words are drawn anew for each epoch; "static": all epochs see the same.
        copies: int, how many pairs, with other hidden words, come of the same text in one pass (dupe_factor, 10 in the
            authors' code, for static masking).
        max_predictions: int, the most hidden words of a row; None takes mask_rate of max_length, rounded up: 20 of 128
            as in the authors' code.
        mask_rate: float, the share of tokens that are predicted.
        shares: of [MASK], of the same token, of any token among them (table 8).
        short_rate: float, the share of shorter pairs.
        seed: int, not negative.

    Attributes:
        pairs: int, rows of the current pass.
        random: float, the share of rows whose B is not the next.
        epoch: int, the number of the current pass, from 0; set it to resume.

    Raises:
        ValueError: if there is no text, `next_sentence` has one document only, the tokenizer lacks a special id, shares
            are not three that add up to 1, a name is unknown, or an argument is out of range.
    """

    label_pad_id = 0  # of places that are not used
    order_varies = True

    def __init__(self, documents, tokenizer, batch_size=32, max_length=128, objective="masked", next_sentence=True,
                 whole_word=False, masking="dynamic", copies=1, max_predictions=None, mask_rate=0.15,
                 shares=(0.8, 0.1, 0.1), short_rate=0.1, seed=0):  # fmt: skip
        super().__init__()
        most = 1 if max_predictions is None else max_predictions
        _check_integers(1, batch_size=batch_size, copies=copies, max_predictions=most)
        _check_integers(5, max_length=max_length)
        _check_integers(0, seed=seed)
        for name, value, known in (("objective", objective, ("masked", "left_to_right")),
                                   ("masking", masking, ("dynamic", "static"))):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares must be three that add up to 1; got {tuple(shares)}.")
        if not 0 < mask_rate < 1 or not 0 <= short_rate <= 1:
            raise ValueError(f"mask_rate and short_rate must be shares; got {mask_rate} and {short_rate}.")
        special = {name: getattr(tokenizer, name, None) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
        missing = [name for name, value in special.items() if value is None]
        if missing:
            raise ValueError(f"The tokenizer has no {', '.join(missing)}; WordPiece has.")
        self.documents = documents if isinstance(documents, Documents) else Documents.encode(documents, tokenizer)
        if next_sentence and len(self.documents) < 2:
            raise ValueError("Random next sentences come from another document, and there is one only.")
        self._special, self.pad_id, self.vocab_size = special, tokenizer.pad_id, tokenizer.vocab_size
        self._continues = np.asarray(tokenizer.continues) if whole_word else None
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.objective, self.next_sentence, self.masking = objective, next_sentence, masking
        self.copies, self.mask_rate, self.shares, self.short_rate = copies, mask_rate, tuple(shares), short_rate
        if max_predictions is None:
            max_predictions = max_length - 1 if objective != "masked" else int(np.ceil(mask_rate * max_length))
        self.max_predictions = max_predictions
        self._count = 0  # rows, once they are known
        self.epoch = 0

    def _order(self, epoch):
        """Lists of rows, int (at most batch_size,)."""
        self._drawn = 0 if self.masking == "static" else epoch
        generator = np.random.default_rng([self.seed, self._drawn])
        found = []
        while len(found) < self.copies or sum(map(len, found)) < self._count:
            found.append(_pairs(self.documents, self._room, self.next_sentence, self.short_rate, generator))
        self._pairs = generator.permutation(np.concatenate(found))[: self._count or None]
        self._count = len(self._pairs)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(self._count)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    @property
    def _room(self):
        return self.max_length - (3 if self.next_sentence else 2)

    @property
    def pairs(self):
        return len(self._pairs)

    @property
    def random(self):
        return float(self._pairs[:, 4].mean())

    def row(self, i):
        """Row `i` of the current pass.

        Returns:
            token_ids, int (tokens,); the length of the first segment with its special tokens; and the hidden words'
            places and ids, int (n,).
        """
        first, last, second, end, _ = self._pairs[i]
        cls_id, sep_id = self._special["cls_id"], self._special["sep_id"]
        ids = [[cls_id], self.documents.ids[first:last], [sep_id]]
        ids += [self.documents.ids[second:end], [sep_id]] * self.next_sentence
        ids, middle = np.concatenate(ids), int(last - first) + 2
        if self.objective == "left_to_right":
            return left_to_right(ids, self.max_predictions), middle
        words = np.flatnonzero((np.arange(len(ids)) != 0) & (np.arange(len(ids)) != middle - 1))
        words = words[words != len(ids) - 1]
        if self._continues is None:
            groups = words[:, None].tolist()
        else:
            begins = ~self._continues[ids[words]] | (np.diff(words, prepend=-1) != 1)
            groups = [group.tolist() for group in np.split(words, np.flatnonzero(begins)[1:])]
        generator = np.random.default_rng([self.seed, self._drawn, 2, i])
        found = masked_lm(ids, groups, generator, self._special["mask_id"], self.vocab_size, self.mask_rate,
                          self.max_predictions, self.shares)  # fmt: skip
        return found, middle

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"token_ids": int32 (rows, max_length), "segment_ids": int32 (rows, max_length), "masked_positions": int32
            (rows, max_predictions)}, and the labels: {"masked_lm": int32 (rows, max_predictions), "next_sentence":
            int32 (rows,), 1 where B is not the next}. Places that are not used are 0, and so are their labels, which
            losses leave out.
        """
        members = self._take(index)
        shape = len(members), self.max_length
        token_ids = np.full(shape, self.pad_id, "int32")
        segments = np.zeros(shape, "int32")
        places, labels = np.zeros((2, len(members), self.max_predictions), "int32")
        for k, i in enumerate(members):
            (seen, where, hidden), middle = self.row(i)
            token_ids[k, : len(seen)] = seen
            segments[k, middle : len(seen)] = 1
            places[k, : len(where)], labels[k, : len(where)] = where, hidden
        x = {"token_ids": token_ids, "segment_ids": segments, "masked_positions": places}
        y = {"masked_lm": labels}
        if self.next_sentence:
            y["next_sentence"] = self._pairs[members, 4].astype("int32")
        return x, y

    def __str__(self):
        lengths = (self._pairs[:, 1] - self._pairs[:, 0] + self._pairs[:, 3] - self._pairs[:, 2]).sum()
        padding = 1 - (lengths + (self.max_length - self._room) * self.pairs) / (self.pairs * self.max_length)
        return (
            f"{len(self.documents):,} documents of {len(self.documents.ids):,} pieces, {self.pairs:,} rows "
            f"({self.random:.0%} with a random second segment), {len(self):,} batches, {padding:.1%} padding"
        )


def _pairs(documents, room, next_sentence, short_rate, generator):
    """The rows of one pass over the documents: int (rows, 5), where A and B begin and end among the ids, and whether B
    is random. Without next_sentence, B is empty."""
    found, starts = [], documents.sentences
    for document in range(len(documents)):
        begin, end = int(documents.documents[document]), int(documents.documents[document + 1])
        places = np.asarray(starts[begin : end + 1]).tolist()
        short = generator.random() < short_rate
        target = int(generator.integers(2, room + 1)) if short else room
        chunk, i, n = 0, 0, end - begin
        while i < n:
            if i < n - 1 and places[i + 1] - places[chunk] < target:
                i += 1
                continue
            if not next_sentence:
                found.append((*_cut(places[chunk], places[i + 1], 0, 0, room, generator), 0))
            else:
                sentences = i + 1 - chunk
                middle = chunk + (1 if sentences == 1 else int(generator.integers(1, sentences)))
                is_random = sentences == 1 or generator.random() < 0.5
                if is_random:
                    second = _elsewhere(documents, document, target - (places[middle] - places[chunk]), generator)
                    i = middle - 1
                else:
                    second = places[middle], places[i + 1]
                found.append((*_cut(places[chunk], places[middle], *second, room, generator), int(is_random)))
            chunk, i = i + 1, i + 1
    return np.array(found, "int64")


def _elsewhere(documents, document, target, generator):
    """Where a run of sentences of another document begins and ends, `target` tokens long if there are so many."""
    for _ in range(_TRIES):
        other = int(generator.integers(len(documents)))
        if other != document:
            break
    begin, end = int(documents.documents[other]), int(documents.documents[other + 1])
    first = int(generator.integers(begin, end))
    places = documents.sentences[first : end + 1]
    last = min(int(np.searchsorted(places, places[0] + max(target, 1))), end - first)
    return int(places[0]), int(places[last])


def _cut(a, b, c, d, room, generator):
    """A = [a, b) and B = [c, d) after tokens are dropped, one by one, from the longer one, B if both are equally long,
    at its front or its back."""
    excess = (b - a) + (d - c) - room
    if excess <= 0:
        return a, b, c, d
    ahead = min(abs((b - a) - (d - c)), excess)
    rest = excess - ahead
    of_first = rest // 2 + (ahead if b - a > d - c else 0)
    fronts = generator.binomial(of_first, 0.5), generator.binomial(excess - of_first, 0.5)
    a, b = a + fronts[0], b - (of_first - fronts[0])
    return a, b, c + fronts[1], d - (excess - of_first - fronts[1])
