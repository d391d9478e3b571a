"""What holds for batches and for the readers of text, whatever the pairs, the sizes and the order."""

import gzip
import lzma
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmfound import data
from llmfound.data import TranslationBatches, pad


def ids_of(text, pad_id):
    """One id for each character, from 3, none of them `pad_id`."""
    return [3 + i + (3 + i >= pad_id > 2) for i in map(ord, text)]


def codepoints(pad_id=0, start_id=1, end_id=2):
    """A tokenizer of one id for each character."""
    return SimpleNamespace(
        pad_id=pad_id, start_id=start_id, end_id=end_id, vocab_size=2**21,
        encode_batch=lambda texts: [ids_of(text, pad_id) for text in texts],
    )  # fmt: skip


texts = st.text(max_size=4) | st.text("abc", max_size=20)
pair_lists = st.lists(st.tuples(texts, texts), min_size=1, max_size=30)
pad_ids = st.sampled_from([0, 2, 100])
options = st.fixed_dictionaries(
    dict(
        num_buckets=st.integers(1, 5),
        batch_tokens=st.integers(21, 150),
        batch_size=st.none() | st.integers(1, 7),
        shuffle=st.booleans(),
        seed=st.integers(0, 2**40),
    )
)


def batches_of(pairs, target_pad=0, **arguments):
    return TranslationBatches(pairs, codepoints(), codepoints(target_pad, start_id=target_pad + 1), **arguments)


def stripped(row, pad_id):
    """A row without the padding on its right; there must be none elsewhere."""
    row = row.tolist()
    while row and row[-1] == pad_id:
        row.pop()
    return row


def contents(batches, target_pad):
    """The pairs of ids of one pass, in its order; every batch is held against the documented layout."""
    found = []
    for index in range(len(batches)):
        x, labels = batches[index]
        assert set(x) == {"source_ids", "target_ids"}
        assert {x["source_ids"].dtype, x["target_ids"].dtype, labels.dtype} == {np.dtype("int32")}
        assert (*x["source_ids"].shape, labels.shape[1]) in batches.shapes
        assert x["target_ids"].shape == labels.shape
        for source, target, label in zip(x["source_ids"], x["target_ids"], labels):
            source, target, label = stripped(source, 0), stripped(target, target_pad), stripped(label, target_pad)
            if not source:
                assert not target and not label  # a row of padding
                continue
            *source, source_end = source
            start, *target = target
            assert (source_end, start) == (2, target_pad + 1)
            if target_pad == 2:  # the end looks like padding
                assert label == target
            else:
                assert label == [*target, 2]
            found.append((tuple(source), tuple(target)))
    return found


def expected(pairs, target_pad):
    return [(tuple(ids_of(source, 0)), tuple(ids_of(target, target_pad))) for source, target in pairs]


@given(pair_lists, options, pad_ids, st.integers(0, 5))
def test_every_epoch_has_every_pair_once(pairs, arguments, target_pad, epoch):
    batches = batches_of(iter(pairs), target_pad, **arguments)
    batches.epoch = epoch
    for _ in range(2):
        found = contents(batches, target_pad)
        assert Counter(found) == Counter(expected(pairs, target_pad))
        batches.epoch += 1


@given(pair_lists, options)
def test_shapes_keep_to_the_budget_and_the_counts_are_exact(pairs, arguments):
    batches = batches_of(pairs, **arguments)
    assert 1 <= len(batches.shapes) == len(set(batches.shapes)) <= arguments["num_buckets"]
    assert batches.shapes == sorted(batches.shapes, key=lambda shape: shape[1:])
    for rows, source_length, target_length in batches.shapes:
        if arguments["batch_size"] is None:
            assert rows * max(source_length, target_length) <= arguments["batch_tokens"]
        else:
            assert rows == arguments["batch_size"]
    found = [batches[i] for i in range(len(batches))]
    assert {(*x["source_ids"].shape, y.shape[1]) for x, y in found} == set(batches.shapes)
    labels = sum(len(target) + 1 for _, target in pairs)
    real = sum(len(source) + 1 for source, _ in pairs) + labels
    cells = sum(x["source_ids"].size + y.size for x, y in found)
    assert batches.tokens_per_epoch == labels == sum(np.count_nonzero(y) for _, y in found)
    assert batches.padding == pytest.approx(1 - real / cells)
    assert batches.skipped == 0 and 0 <= batches.padding < 1


@given(pair_lists, options, st.integers(0, 3))
def test_the_order_is_a_function_of_seed_and_epoch(pairs, arguments, epoch):
    walked, jumped = batches_of(pairs, **arguments), batches_of(pairs, **arguments)
    jumped.epoch = epoch
    for _ in range(epoch):
        for _ in walked:
            pass
    assert walked.epoch == epoch
    for (x, y), (other_x, other_y) in zip(list(walked), list(jumped)):
        np.testing.assert_array_equal(x["source_ids"], other_x["source_ids"])
        np.testing.assert_array_equal(x["target_ids"], other_x["target_ids"])
        np.testing.assert_array_equal(y, other_y)
    if not arguments["shuffle"]:
        assert contents(jumped, 0) == contents(batches_of(pairs, **{**arguments, "seed": 5}), 0)


@given(st.data(), pair_lists, options)
def test_an_epoch_ends_when_every_batch_was_asked_for_and_not_before(data, pairs, arguments):
    batches = batches_of(pairs, **arguments)
    epoch, asked = 0, set()
    batches.on_epoch_begin()
    for _ in range(3):
        for index in data.draw(st.lists(st.integers(0, len(batches) - 1), max_size=2 * len(batches))):
            batches[index]
            asked.add(index)
        batches.on_epoch_end()
        if len(asked) == len(batches):
            epoch, asked = epoch + 1, set()
            assert batches.epoch == epoch
            batches.on_epoch_begin()
        assert batches.epoch == epoch


@given(pair_lists, st.integers(1, 20), st.booleans())
def test_longer_pairs_are_counted_and_left_out_or_refused(pairs, max_length, drop_long):
    kept = [pair for pair in pairs if max(map(len, pair)) + 1 <= max_length]
    make = lambda: batches_of(pairs, max_length=max_length, drop_long=drop_long)  # noqa: E731
    if not kept or (len(kept) < len(pairs) and not drop_long):
        with pytest.raises(ValueError, match=f"{len(pairs) - len(kept)} of {len(pairs)} pairs have more than"):
            make()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = make()
    assert len(caught) == (len(kept) < len(pairs))
    assert batches.skipped == len(pairs) - len(kept)
    assert Counter(contents(batches, 0)) == Counter(expected(kept, 0))
    assert max(max(shape[1:]) for shape in batches.shapes) <= max_length


@given(
    st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), min_size=1, max_size=6),
    st.integers(-(2**31), 2**31 - 1), st.integers(1, 5), st.none() | st.integers(1, 12), st.booleans(),
)  # fmt: skip
def test_pad_fills_rows_on_the_right(sequences, pad_id, multiple, length, as_arrays):
    longest = max(1, *map(len, sequences), 1)
    sequences = [np.array(row, "int64") for row in sequences] if as_arrays else sequences
    if length is not None and longest > length:
        with pytest.raises(ValueError, match=f"has {longest} ids, more than length={length}"):
            pad(sequences, pad_id, multiple, length)
        return
    array = pad(sequences, pad_id, multiple, length)
    width = length or -(-longest // multiple) * multiple
    assert array.dtype == "int32" and array.shape == (len(sequences), width)
    assert array.tolist() == [[*row, *[pad_id] * (width - len(row))] for row in sequences]


# Readers

PACK = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
NEWLINES = "\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r"  # where str.splitlines would break, too
lines_of = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\t") | st.sampled_from(NEWLINES))
lines_of = lines_of.map(lambda line: line.rstrip("\r"))  # before a newline it belongs to the end of the line
packed = st.tuples(st.sampled_from(sorted(PACK)), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def write(path, lines, newline, ends_in_newline, has_mark):
    text = "\ufeff" * has_mark + newline.join(lines) + newline * ends_in_newline
    path.write_bytes(PACK[path.suffix](text.encode("utf-8")))
    return path


def readable(lines, ends_in_newline, has_mark):
    """Whether a file of these lines is not empty, and its first line does not begin like a byte order mark."""
    return (ends_in_newline or lines[-1] or (len(lines) > 1)) and (has_mark or not lines[0].startswith("\ufeff"))


@given(st.lists(lines_of, min_size=1, max_size=6), packed)
def test_lines_come_back_as_they_were_written(folder, lines, how):
    suffix, newline, ends_in_newline, has_mark = how
    ends_in_newline = ends_in_newline or not lines[-1]  # an empty last line shows only by its end
    assume(readable(lines, ends_in_newline, has_mark))
    path = write(folder / f"lines{suffix}", lines, newline, ends_in_newline, has_mark)
    assert data.read_lines(path) == lines


@given(st.lists(st.tuples(lines_of, lines_of, lines_of), min_size=1, max_size=6), packed, st.permutations(range(3)))
def test_pairs_come_back_as_they_were_written(folder, rows, how, order):
    suffix, newline, _, has_mark = how
    assume(readable([rows[0][0]], True, has_mark))
    path = write(folder / f"pairs{suffix}", ["\t".join(row) for row in rows], newline, True, has_mark)
    first, second, _ = order
    assert data.read_pairs(path, columns=(first, second)) == [(row[first], row[second]) for row in rows]
    split = rows[0][0]
    chosen = [(target, source) for name, source, target in rows if name == split]
    assert data.read_pairs(path, split, columns=(1, 0)) == chosen
    assert data.read_pairs(path, split) == [(source, target) for target, source in chosen]
    if len(rows) > 1:
        with pytest.raises(ValueError, match="line 1: 3 tab-separated columns where 2 are needed"):
            data.read_pairs(path)


@given(st.lists(st.tuples(lines_of, lines_of), min_size=1, max_size=6), packed, packed, st.integers(0, 2))
def test_parallel_files_belong_together_line_by_line(folder, pairs, how, other, missing):
    sources, targets = (list(side) for side in zip(*pairs))
    targets += ["more"] * missing
    paths = []
    for name, lines, (suffix, newline, _, has_mark) in (("source", sources, how), ("target", targets, other)):
        assume(readable(lines, True, has_mark))
        paths.append(write(folder / f"{name}{suffix}", lines, newline, True, has_mark))
    if missing:
        with pytest.raises(ValueError, match=f"has {len(pairs)} lines, .* has {len(targets)}"):
            data.read_parallel(*paths)
    else:
        assert data.read_parallel(*paths) == pairs


@given(lines_of, st.binary(min_size=1, max_size=4), lines_of)
def test_what_is_not_utf8_is_refused_with_its_place(folder, before, junk, after):
    content = before.encode() + b"\n" + junk + b"\n" + after.encode()
    path = folder / "bytes.txt"
    path.write_bytes(content)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        with pytest.raises(ValueError, match=f"line {line}: byte 0x{content[error.start]:02x} at offset {error.start}"):
            data.read_lines(path)
    else:
        assert "\n".join(data.read_lines(path)).encode()
