"""Questions on texts: windows, labels, and answers from logits."""

import gzip
import json

import numpy as np
import pytest

from llmfound.data import Question, QuestionAnsweringBatches, WordPiece, read_squad
from llmfound.data.squad import owners, windows

pytestmark = pytest.mark.on_one_backend

WORDS = [f"w{i}" for i in range(40)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "who", "?", ".", "walk", "##ed", "(", ")", "paris", "é"]
TOKENIZER = WordPiece.from_vocabulary(PIECES)
TEXT = " ".join(WORDS[:12]) + " Walked (Paris)."
QUESTIONS = [
    Question("a", "who ?", TEXT, (("w3 w4", TEXT.index("w3")), ("w3", TEXT.index("w3")))),
    Question("b", "who", TEXT, (("Paris", TEXT.index("Paris")),)),
    Question("c", "? who ?", "w1 w2", (), True),
]


def batches(questions=QUESTIONS, **options):
    options = dict(max_length=12, stride=4, shuffle=False, length_multiple=4) | options
    return QuestionAnsweringBatches(questions, TOKENIZER, **options)


def rows(found):
    return [(x["token_ids"][i], x["segment_ids"][i], y[i]) for x, y in (found[k] for k in range(len(found)))
            for i in range(len(y))]  # fmt: skip


# Windows


@pytest.mark.parametrize("pieces, expected", [
    (500, [(0, 371), (128, 499), (256, 500)]), (371, [(0, 371)]), (372, [(0, 371), (128, 372)]), (1, [(0, 1)]), (0, []),
])  # fmt: skip
def test_check_7_windows(pieces, expected):
    assert windows(pieces, 384 - 10 - 3, 128) == expected


def test_check_7_owners():
    found = owners(windows(500, 371, 128))
    assert (found[:250] == 0).all() and (found[250:499] == 1).all() and found[499] == 2


def test_rows_hold_question_window_and_the_whole_answer():
    found = batches()
    assert found.windows[:3] == [(0, 0, 7), (0, 4, 11), (0, 8, 15)]
    assert {i for i, _, _ in found.windows} == {0, 1, 2} and str(found).startswith("3 questions (0 cut), ")
    for (i, start, end), (ids, segments, (first, last)) in zip(found.windows, rows(found)):
        question, text = (TOKENIZER.encode(x) for x in (QUESTIONS[i].question, QUESTIONS[i].context))
        row = [2, *question, 3, *text[start:end], 3]
        assert ids.tolist() == row + [0] * (12 - len(row))
        assert segments.tolist() == [0] * (len(question) + 2) + [1] * (end - start + 1) + [0] * (12 - len(row))
        if first:
            answer = TOKENIZER.encode(QUESTIONS[i].answers[0][0])
            assert ids[first : last + 1].tolist() == answer
    labels = {tuple(window): y.tolist() for window, (_, _, y) in zip(found.windows, rows(found))}
    assert labels[0, 0, 7] == [4 + 3, 4 + 4] and labels[0, 4, 11] == [0, 0]  # w3 is before the second window
    assert all(label == [0, 0] for (i, _, _), label in labels.items() if i == 2)
    assert sum(label != [0, 0] for (i, _, _), label in labels.items() if i == 1) >= 1


def test_shuffled_windows_are_the_same_windows():
    assert sorted(batches(shuffle=True, batch_size=2)._rows.flat.tolist()) == sorted(batches()._rows.flat.tolist())
    one, other = (batches(shuffle=True, batch_size=2, seed=s) for s in (0, 1))
    seen = [sorted(x.tobytes() for x, _, _ in rows(b)) for b in (batches(),)]
    for shuffled in (one, other):
        texts = sorted(np.trim_zeros(ids, "b").tobytes() for ids, _, _ in rows(shuffled))
        assert texts == sorted(np.trim_zeros(np.frombuffer(x, "int32"), "b").tobytes() for x in seen[0])


# Answers


def logits(found, spans):
    """Logits of rows for which `spans` has {row: (first, last, height)}, places in the row."""
    x = np.zeros((len(found.windows), 2, 12), "float32")
    for row, (first, last, height) in spans.items():
        x[row, 0, first] = x[row, 1, last] = height
    return x


def test_gold_labels_give_gold_answers():
    found = batches()
    spans = {row: (*label, 5.0) for row, (_, _, label) in enumerate(rows(found)) if label[0]}
    answers = found.answers(logits(found, spans))
    assert answers["a"] == "w3 w4" and answers["b"] == "Paris"  # as it is written, without what stands around it
    assert found.candidates(logits(found, spans))["a"].probabilities[0] > 0.9


@pytest.mark.parametrize("lowercase, kept", [(True, "paris\u0301\u0302"), (False, "paris")])
@pytest.mark.parametrize("rest", ["", " w1"])
def test_an_answer_keeps_the_accents_that_the_tokenizer_drops(lowercase, kept, rest):
    question = Question("a", "who", f"w1 paris\u0301\u0302{rest}", (("paris", 3),))
    tokenizer = WordPiece.from_vocabulary([*PIECES, "##\u0301", "##\u0302"], lowercase=lowercase)
    found = QuestionAnsweringBatches([question], tokenizer, max_length=12, shuffle=False, length_multiple=4)
    [(_, _, label)] = rows(found)
    assert found.answers(logits(found, {0: (*label, 5.0)})) == {"a": kept}


def test_an_answer_counts_in_the_window_where_its_first_piece_has_most_context():
    found = batches([QUESTIONS[0]])
    inside = [(row, 4 + 5 - start) for row, (_, start, end) in enumerate(found.windows) if start <= 5 < end]
    assert len(inside) == 2
    owner = owners([(start, end) for _, start, end in found.windows])[5]
    for row, place in inside:
        taken = found.answers(logits(found, {row: (place, place, 9.0)}))["a"] == "w5"
        assert taken == (row == owner)


def test_pairs_that_are_no_answers_are_passed_over():
    found = batches([Question("a", "who", "w1 w2 w3 w4")])
    x = logits(found, {})
    x[0, 0, [0, 1, 4]], x[0, 1, [0, 2, 3]] = [9, 8, 3], [9, 8, 4]  # [CLS], the question; w2 as first, w1 as last
    best = found.candidates(x, n_best=3)["a"]
    assert (
        best.texts[0] == "w1"
        and best.texts[1].startswith("w2")
        and all(text.startswith(("w1", "w2", "w3", "w4")) for text in best.texts)
    )
    assert best.scores == sorted(best.scores, reverse=True) and len(best.texts) == 3 == len(set(best.texts))
    assert sum(best.probabilities) == pytest.approx(1)
    expected = np.exp(np.array(best.scores)) / np.exp(best.scores).sum()
    np.testing.assert_allclose(best.probabilities, expected, rtol=1e-6)
    x[0, 0, 3], x[0, 1, 6] = 20, 20  # w1 to w4
    assert found.answers(x)["a"] == "w1 w2 w3 w4"
    assert found.answers(x, max_answer=3)["a"] != "w1 w2 w3 w4"


def test_fewer_answers_are_the_first_of_many():
    found = batches([Question("a", "who", "w1 w2 w3 w4")])
    x = logits(found, {})
    x[0, 0, 5], x[0, 1, [4, 6]] = 5, [5, 4.9]  # the likeliest last piece lies before the likeliest first one
    assert found.answers(x, n_best=1) == found.answers(x) == {"a": "w3 w4"}


def test_no_answer_by_a_threshold():
    found = batches([Question("a", "who", "w1 w2 w3 w4")])
    x = logits(found, {0: (3, 3, 2.0)})
    x[0, :, 0] = 3.0
    assert found.candidates(x)["a"].null_odds == pytest.approx(6 - 4)
    assert found.answers(x)["a"] == "w1" == found.answers(x, null_threshold=2.5)["a"]
    assert found.answers(x, null_threshold=0.0)["a"] == ""
    assert found.answers(x, null_threshold=np.inf)["a"] == "w1" and found.answers(x, null_threshold=-np.inf)["a"] == ""


def test_the_null_score_is_the_least_of_all_windows():
    found = batches([QUESTIONS[0]])
    x = logits(found, {0: (7, 7, 4.0)})
    x[:, :, 0] = np.arange(1.0, len(x) + 1)[:, None]
    assert found.candidates(x)["a"].null_odds == pytest.approx(2 - 8)


# Errors, files


@pytest.mark.parametrize("call, message", [
    (lambda: batches([]), "There are no questions"),
    (lambda: batches([*QUESTIONS, Question("b", "who", "w1")]), "Questions 1 and 3 have one id, 'b'"),
    (lambda: batches([Question("x", " ", "w1")]), "Question x has no words: ' '"),
    (lambda: batches([Question("x", "who", "\u200b")]), r"The text of question x has no words"),
    (lambda: batches([Question("x", "who", None)]), "Question x: question and context must be str .*'who' and None"),
    (lambda: batches([Question("x", "who", "w1 w2", [("w2", np.int64(2))])]),
     "x: the answer 'w2' is not at character 2, but ' w'"),
    (lambda: batches([Question("x", "who", "w1 w2", [("w2", -2)])]), "'w2' is not at character -2, but 'w1'"),
    (lambda: batches([Question("x", "who", "w1", {"text": ["w1"], "answer_start": [0]})]), "x: answers must be pairs"),
    (lambda: batches([Question("x", "who", "w1 w2", (("w2", "3"),))]), r"be pairs .*; got \(\('w2', '3'\),\)"),
    (lambda: batches(max_length=6), r"max_length \(6\) leaves no room for a text behind 3 pieces of a question"),
    (lambda: batches([Question("x", "who who who", "w1")], max_question=2, cut_questions=False),
     "Question x has 3 pieces, more than max_question=2"),
    (lambda: batches(stride=0), "stride must be an integer of at least 1"),
    (lambda: batches(shuffle=True).answers(np.zeros((3, 2, 12))), "make these batches with shuffle=False"),
    (lambda: batches().answers(np.zeros((3, 2, 12))), r"logits must be \(\d+, 2, length\); got \(3, 2, 12\)"),
])  # fmt: skip
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_long_questions_are_cut():
    found = batches([Question("x", "who who who", "w1")], max_question=2)
    assert found.cut == 1 and rows(found)[0][0].tolist()[:6] == [2, PIECES.index("who"), PIECES.index("who"), 3, 6, 3]


def test_reading_both_versions(tmp_path):
    entry = {"id": "1", "question": "who?", "answers": [{"text": "b c", "answer_start": 2}]}
    none = {"id": "2", "question": "why?", "answers": [], "is_impossible": True}
    content = {"data": [{"title": "T", "paragraphs": [{"context": "a b c", "qas": [entry, none]}]}]}
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert read_squad(path) == [Question("1", "who?", "a b c", (("b c", 2),), False, "T"),
                                Question("2", "why?", "a b c", (), True, "T")]  # fmt: skip
    del none["is_impossible"], entry["answers"]
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert [question.impossible for question in read_squad(path)] == [False, True]
    entry["answers"] = [{"text": "b c", "answer_start": 1}]
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(ValueError, match="the answer 'b c' of 1 is not at character 1"):
        read_squad(path)
    for bad in ("{", "[]", '{"version": 1}', '{"data": "x"}', '{"data": [{"id": "1", "question": "who?"}]}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match=r"bad.json is no file of SQuAD: "):
            read_squad(tmp_path / "bad.json")
