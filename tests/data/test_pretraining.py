"""Pairs of segments and hidden words, against the authors' rules written out plainly."""

import itertools
import types

import numpy as np
import pytest

from llmfound.data import (
    Documents,
    PretrainingBatches,
    WordPiece,
    left_to_right,
    masked_lm,
    read_documents,
    split_sentences,
    write_documents,
)
from llmfound.data.pretraining import _cut, _pairs

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = WordPiece.from_vocabulary([*SPECIAL, *WORDS, "run", "##ning", "##s"])
PAD, UNK, CLS, SEP, MASK = range(5)


def corpus(documents=40, seed=0, sentences=(1, 12), words=(2, 12)):
    rng = np.random.default_rng(seed)
    return [[" ".join(rng.choice(WORDS, rng.integers(*words))) for _ in range(rng.integers(*sentences))]
            for _ in range(documents)]  # fmt: skip


def batches(documents=None, **options):
    options = dict(batch_size=4, max_length=32) | options
    return PretrainingBatches(corpus() if documents is None else documents, TOKENIZER, **options)


def rows(found):
    """Every row of a pass, in the order of batches: inputs and labels by name."""
    for index in range(len(found)):
        x, y = found[index]
        for k in range(len(x["token_ids"])):
            yield {name: values[k] for name, values in {**x, **y}.items()}


def restored(row):
    """The row before words were hidden, without padding."""
    ids, used = row["token_ids"].copy(), row["masked_lm"] != 0
    ids[row["masked_positions"][used]] = row["masked_lm"][used]
    return ids[: len(np.trim_zeros(ids, "b"))]


# Pairs


class Recorded:
    """A generator that hands out the same draws to two programs."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def random(self):
        return self.rng.random()

    def integers(self, low, high=None):
        return self.rng.integers(low, high)


def plain_pairs(sentences_of, room, short_rate, generator):
    """The authors' algorithm over lists of tokens; without truncation."""
    found = []
    for number, document in enumerate(sentences_of):
        target = room
        if generator.random() < short_rate:
            target = generator.integers(2, room + 1)
        chunk, length, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            length += len(document[i])
            if i == len(document) - 1 or length >= target:
                a_end = 1
                if len(chunk) >= 2:
                    a_end = generator.integers(1, len(chunk))
                first, second = [*itertools.chain(*chunk[:a_end])], []
                is_random = len(chunk) == 1 or generator.random() < 0.5
                if is_random:
                    wanted = target - len(first)
                    for _ in range(10):
                        other = generator.integers(len(sentences_of))
                        if other != number:
                            break
                    start = generator.integers(0, len(sentences_of[other]))
                    for sentence in sentences_of[other][start:]:
                        second = second + sentence
                        if len(second) >= wanted:
                            break
                    i -= len(chunk) - a_end
                else:
                    second = [*itertools.chain(*chunk[a_end:])]
                found.append((first, second, is_random))
                chunk, length = [], 0
            i += 1
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("room, short_rate", [(29, 0.1), (12, 0.5), (60, 0.0)])
def test_pairs_are_those_of_the_authors_algorithm(seed, room, short_rate, monkeypatch):
    encoded = Documents.encode(corpus(seed=seed), TOKENIZER)
    sentences = [[encoded.ids[a:b].tolist() for a, b in itertools.pairwise(starts)]
                 for starts in (encoded.sentences[begin : end + 1]
                                for begin, end in itertools.pairwise(encoded.documents))]  # fmt: skip
    shift = encoded.documents

    class Shifted(Recorded):  # ours draws a sentence among all, theirs among those of its document
        def integers(self, low, high=None):
            if high is not None and low in shift and high in shift and low > 1:
                return low + self.rng.integers(0, high - low)
            return self.rng.integers(low, high)

    expected = plain_pairs(sentences, room, short_rate, Recorded(seed))
    monkeypatch.setattr("llmfound.data.pretraining._cut", lambda a, b, c, d, room, generator: (a, b, c, d))
    found = _pairs(encoded, room, True, short_rate, Shifted(seed))
    assert [(encoded.ids[a:b].tolist(), encoded.ids[c:d].tolist(), bool(r)) for a, b, c, d, r in found] == expected


@pytest.mark.parametrize("lengths", [(9, 3), (3, 9), (6, 6), (7, 6), (20, 1), (1, 20)])
@pytest.mark.parametrize("room", [2, 5, 9, 11, 12, 21])
def test_truncation_takes_from_the_longer_one(lengths, room):
    a, b = lengths
    while a + b > room:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    seen = set()
    for seed in range(40):
        first, last, second, end = _cut(100, 100 + lengths[0], 200, 200 + lengths[1], room, np.random.default_rng(seed))
        assert (last - first, end - second) == (a, b)
        assert 100 <= first <= last <= 100 + lengths[0] and 200 <= second <= end <= 200 + lengths[1]
        seen.add((int(first), int(second)))
    assert len(seen) > 1 or sum(lengths) <= room


def test_rows_are_pairs_with_their_segments():
    documents = corpus()
    text = {tuple(ids) for ids in TOKENIZER.encode_batch([" ".join(document) for document in documents])}
    found = batches(documents)
    for row in rows(found):
        ids, segments = restored(row), row["segment_ids"]
        middle = ids.tolist().index(SEP)
        assert ids[0] == CLS and ids[-1] == SEP and (ids == SEP).sum() == 2 and len(ids) <= 32
        assert segments.tolist() == [0] * (middle + 1) + [1] * (len(ids) - middle - 1) + [0] * (32 - len(ids))
        first, second = ids[1:middle].tolist(), ids[middle + 1 : -1].tolist()
        together = [whole for whole in text if contains(whole, first)]
        assert together and any(contains(whole, second) for whole in text)
        if not row["next_sentence"] and len(ids) < 32:  # nothing was cut
            assert any(contains(whole, first + second) for whole in text)
    assert str(found).startswith(f"40 documents of {len(found.documents.ids):,} pieces, {found.pairs} rows (")


def contains(whole, part):
    return any(list(whole[i : i + len(part)]) == part for i in range(len(whole) - len(part) + 1))


def test_check_6_share_of_random_segments():
    found = batches(corpus(300, sentences=(1, 31), words=(5, 41)), max_length=128)
    assert found.random == pytest.approx(0.58, abs=0.05) and found.random > 0.5
    labels = [row["next_sentence"] for row in rows(found)]
    assert np.mean(labels) == pytest.approx(found.random)


def test_without_next_sentence_rows_are_one_segment():
    documents = corpus()
    found = batches(documents, next_sentence=False, short_rate=0)
    total = 0
    for row in rows(found):
        ids = restored(row)
        assert "next_sentence" not in row and (ids == SEP).sum() == 1 and not row["segment_ids"].any()
        total += len(ids) - 2
    assert 0.8 * len(found.documents.ids) < total <= len(found.documents.ids)


# Hidden words


@pytest.mark.parametrize(
    "length, expected", [(10, 2), (30, 4), (50, 8), (70, 10), (90, 14), (110, 16), (128, 19), (512, 77)]
)
def test_check_6_how_many_words_are_hidden(length, expected):
    ids = np.arange(length) + 5
    groups = [[i] for i in range(1, length - 1)]
    seen, places, hidden = masked_lm(ids, groups, np.random.default_rng(0), MASK, 600, max_predictions=100)
    assert len(places) == expected and (ids[places] == hidden).all() and (np.diff(places) > 0).all()
    assert (np.delete(seen, places) == np.delete(ids, places)).all()
    assert len(masked_lm(ids, groups, np.random.default_rng(0), MASK, 600, max_predictions=5)[1]) == min(expected, 5)


def test_check_6_what_they_become():
    ids, groups = np.full(1000, 50), [[i] for i in range(1000)]
    seen = np.concatenate(
        [
            masked_lm(ids, groups, np.random.default_rng(s), MASK, 10_000, 0.5, 500)[0][places]
            for s in range(100)
            for places in [masked_lm(ids, groups, np.random.default_rng(s), MASK, 10_000, 0.5, 500)[1]]
        ]
    )
    assert len(seen) == 50_000
    shares = (seen == MASK).mean(), (seen == 50).mean(), ((seen != MASK) & (seen != 50)).mean()
    assert shares == pytest.approx((0.8, 0.1, 0.1), abs=0.01)
    other = seen[(seen != MASK) & (seen != 50)]
    assert other.min() < 100 and other.max() > 9900 and abs(other.mean() - 5000) < 150
    only = masked_lm(ids, groups, np.random.default_rng(0), MASK, 10, 0.5, 500, (0.0, 0.0, 1.0))
    assert set(only[0][only[1]]) == set(range(10))  # any word, special ones included


def test_special_tokens_are_never_hidden_and_labels_restore_the_text():
    documents = corpus()
    found = batches(documents, shares=(1.0, 0.0, 0.0), masking="static")
    twin = batches(documents, objective="left_to_right", masking="static")
    texts = [row["token_ids"] for row in rows(twin)]
    for row, text in zip(rows(found), texts, strict=True):
        assert (restored(row) == np.trim_zeros(text, "b")).all()
        hidden = row["masked_lm"][row["masked_lm"] != 0]
        assert not np.isin(hidden, [PAD, CLS, SEP]).any()
        assert (row["token_ids"] == MASK).sum() == len(hidden) == max(1, round(0.15 * (text != PAD).sum()))


def test_whole_words_are_hidden_together():
    documents = [["w1 runnings w2 running w3 w4 w5 w6 w7 running"] * 3 for _ in range(5)]
    found = batches(documents, whole_word=True, shares=(1.0, 0.0, 0.0), mask_rate=0.3)
    continues, several = TOKENIZER.continues, 0
    for row in rows(found):
        before, hidden = np.pad(restored(row), (0, 1)), row["token_ids"] == MASK
        for start in np.flatnonzero(~continues[before[:-1]] & continues[before[1:]]):
            end = start + 1
            while continues[before[end]]:
                end += 1
            if not continues[before[start]] and before[start] == len(SPECIAL) + len(WORDS):
                assert len(set(hidden[start:end])) == 1
                several += hidden[start]
    assert several > 5
    single = batches(documents, shares=(1.0, 0.0, 0.0), mask_rate=0.3)
    apart = [row for row in rows(single) for i in np.flatnonzero(continues[restored(row)])
             if (row["token_ids"][i] == MASK) != (row["token_ids"][i - 1] == MASK)]  # fmt: skip
    assert apart


def test_left_to_right_asks_for_the_next_token():
    seen, places, labels = left_to_right(np.array([2, 7, 8, 3]))
    assert seen.tolist() == [2, 7, 8, 3] and places.tolist() == [0, 1, 2] and labels.tolist() == [7, 8, 3]
    for row in rows(batches(objective="left_to_right")):
        used = row["masked_lm"] != 0
        ids = np.trim_zeros(row["token_ids"], "b")
        assert row["masked_lm"][used].tolist() == ids[1:].tolist() and row["masked_positions"].shape == (31,)
        assert row["masked_positions"][used].tolist() == list(range(len(ids) - 1))


# Passes


def everything(found):
    return [(x["token_ids"].tolist(), y["masked_lm"].tolist()) for x, y in (found[i] for i in range(len(found)))]


def test_epochs_are_a_function_of_seed_and_epoch():
    one, other = batches(), batches()
    first = everything(one)
    assert everything(other) == first
    for epoch in range(1, 9):
        one.epoch = epoch
        assert one.pairs == other.pairs and len(one) == len(other)
    one.epoch = 3
    third = everything(one)
    assert third != first
    other.epoch = 3
    assert [other[i][0]["token_ids"].tolist() for i in reversed(range(len(other)))] == [x for x, _ in reversed(third)]
    assert everything(batches(seed=1)) != first


def test_static_masking_repeats_the_same_rows_in_another_order():
    found = batches(masking="static", copies=3)
    first = everything(found)
    found.epoch = 1
    second = everything(found)
    assert first != second
    assert sorted(row for x, _ in first for row in x) == sorted(row for x, _ in second for row in x)
    assert found.pairs > 2.5 * batches().pairs


def test_documents_may_be_arrays():
    documents = [["w1", "w2 w3"], ["w4"], ["w5", "w6"]]
    found, expected = (Documents.encode(x, TOKENIZER) for x in (map(np.array, documents), documents))
    for name in ("ids", "sentences", "documents"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_files_larger_than_memory(tmp_path):
    documents = corpus()
    written = write_documents(tmp_path / "a", iter(iter(document) for document in documents), TOKENIZER)
    assert isinstance(written.ids, np.memmap) and len(written) == 40
    assert everything(batches(Documents.open(tmp_path / "a"))) == everything(batches(documents))
    with pytest.raises(ValueError, match=r"is not empty: \['documents.npy', 'ids.npy', 'sentences.npy'\]"):
        write_documents(tmp_path / "a", documents, TOKENIZER)

    def failing():
        yield ["w1"] * 2000
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_documents(tmp_path / "b", failing(), TOKENIZER)
    with pytest.raises(ValueError, match="There are no sentences"):
        write_documents(tmp_path / "b", [[" "]], TOKENIZER)
    assert not list((tmp_path / "b").iterdir())
    with pytest.raises(FileNotFoundError):
        Documents.open(tmp_path / "b")


def test_sentences_and_documents_without_pieces_are_left_out():
    found = Documents.encode([["w1 w2", " "], [], ["\u200b"], ["w3", "w4 w5"]], TOKENIZER)
    assert found.ids.tolist() == [6, 7, 8, 9, 10] and found.sentences.tolist() == [0, 2, 3, 5]
    assert found.documents.tolist() == [0, 1, 3]


def test_a_model_fits_them():
    import keras

    from llmfound.models import BERT, BERTPretraining
    from llmfound.training import BERTAdam, SmoothedCrossEntropy

    found = batches(batch_size=16)
    bert = BERT(TOKENIZER.vocab_size, num_layers=1, hidden_dim=16, num_heads=2, intermediate_dim=32, max_length=32)
    model = BERTPretraining(bert)
    losses = {"masked_lm": SmoothedCrossEntropy(0.0),
              "next_sentence": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}  # fmt: skip
    model.compile(BERTAdam(0.01), losses)
    history = model.fit(found, epochs=3, shuffle=False, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] and history["masked_lm_loss"][0] < 6


# Text, errors


def test_reading_documents(tmp_path):
    (tmp_path / "text").write_text("\n a b \nc\n\n\n d\n\n", "utf-8")
    assert read_documents(tmp_path / "text") == [["a b", "c"], ["d"]]
    (tmp_path / "blank").write_text("\n \n", "utf-8")
    with pytest.raises(ValueError, match="has no sentences"):
        read_documents(tmp_path / "blank")


@pytest.mark.parametrize("text, expected", [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]), ("It costs 3.50 here. e.g. this", None),
    ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]), ("", []), ("A . B . c", ["A .", "B . c"]),
    ("Was it? (Yes.) No.", ["Was it?", "(Yes.)", "No."]),
])  # fmt: skip
def test_sentences(text, expected):
    assert split_sentences(text) == ([text] if expected is None else expected)


@pytest.mark.parametrize("options, message", [
    (dict(documents=[["w1", "w2"]]), "Random next sentences come from another document, and there is one only"),
    (dict(documents=[]), "There are no sentences"),
    (dict(documents=["w1 w2"]), "A document must be sentences, an iterable of str; got one str, 'w1 w2'"),
    (dict(documents=[["w1"], ["w2", None]]), "Document 1 must be .*; got None as item 1"),
    (dict(documents=[["w1"], {"w2": 1}]), "Document 1 must be .*; got a dict"),
    (dict(objective="span"), "objective must be 'masked' or 'left_to_right'; got 'span'"),
    (dict(masking="none"), "masking must be 'dynamic' or 'static'; got 'none'"),
    (dict(shares=(0.8, 0.1)), r"shares must be three that add up to 1; got \(0.8, 0.1\)"),
    (dict(shares=(0.8, 0.3, -0.1)), "shares must be three"), (dict(shares=(0.8, 0.1, 0.2)), "that add up to 1"),
    (dict(mask_rate=1.5), "mask_rate and short_rate must be shares; got 1.5"),
    (dict(max_length=4), "max_length must be an integer of at least 5"),
    (dict(max_predictions=-1), "max_predictions must be an integer of at least 1"),
    (dict(max_predictions=0), "max_predictions must be an integer of at least 1"),
])  # fmt: skip
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)


def test_a_tokenizer_without_special_pieces():
    bare = types.SimpleNamespace(pad_id=0, encode_batch=TOKENIZER.encode_batch, vocab_size=9)
    with pytest.raises(ValueError, match="The tokenizer has no cls_id, sep_id, mask_id; WordPiece has"):
        PretrainingBatches(corpus(), bare)
