"""ULMFiT against the numbers of its paper, of the AWD-LSTM's, and of a forward pass by another library."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import llmfound
from llmfound import decoding
from llmfound.data import LanguageModelBatches, WordTokenizer
from llmfound.models import Ensemble, ULMFiT, ULMFiTClassifier
from llmfound.testing import assert_close, check_model, fixture, set_weights_by_path
from llmfound.training import (
    DiscriminativeAdam,
    DiscriminativeSGD,
    GradualUnfreezing,
    Perplexity,
    SmoothedCrossEntropy,
)

SIZES = dict(embedding_dim=6, hidden_dim=9)
NO_DROPOUT = dict.fromkeys(
    ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout"), 0.0
)
NO_PENALTY = dict(activation_penalty=0.0, temporal_penalty=0.0)
TOKENS = np.array([[2, 5, 7, 1, 9, 4], [3, 3, 8, 10, 6, 0]], "int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def numpy(x):
    return ops.convert_to_numpy(x)


def tiny(**options):
    return ULMFiT(**{"vocab_size": 13, **SIZES, **NO_DROPOUT, **options})


def tiny_classifier(language_model=None, **options):
    quiet = dict(dropout=0.0, hidden_dropout=0.0)
    return ULMFiTClassifier(language_model or tiny(), 3, hidden_dim=5, **{**quiet, **options})


# Check 1 and 2: numbers of weights


@pytest.mark.parametrize("vocab_size, published", [(10_000, 24_221_600), (33_278, 33_556_078), (60_002, 44_272_402)])
def test_check_1_numbers_of_parameters(vocab_size, published):
    shapes = [(n, 400 if i == 2 else 1150) for i, n in enumerate((400, 1150, 1150))]
    count = vocab_size * 400 + vocab_size + sum(4 * h * (n + h + 1) for n, h in shapes)
    assert count == published - 10_800  # PyTorch has two biases, of which only the sum matters
    small = tiny(vocab_size=30)  # the same formula on a model that is quick to make
    shapes = [(6, 9), (9, 9), (9, 6)]
    assert sum(int(np.prod(w.shape)) for w in small.trainable_weights) == 30 * 6 + 30 + sum(
        4 * h * (n + h + 1) for n, h in shapes
    )


def test_check_1_the_sizes_of_the_paper():
    model = ULMFiT(1000)
    layers = [sum(int(np.prod(w.shape)) for w in lstm.weights) for lstm in model.encoder.lstms]
    assert layers == [7_139_200 - 4600, 10_589_200 - 4600, 2_483_200 - 1600]  # without the second bias
    config = model.encoder.get_config()
    assert [config.get(name) for name in ("pad_id",)] == [0]
    rates = [model.encoder.input_dropout.rate, *(d.rate for d in model.encoder.dropouts)]
    assert rates == [0.4, 0.3, 0.3, 0.4]
    assert (model.encoder.embedding_dropout.rate, model.encoder.lstms[1].weight_dropout.rate) == (0.05, 0.5)


@pytest.mark.parametrize("classes, weights", [(2, 62_652), (6, 62_856), (14, 63_264)])
def test_check_2_the_head(classes, weights):
    head = llmfound.layers.PoolingClassifierHead(classes)
    head(np.zeros((2, 3, 400), "float32"))
    assert sum(int(np.prod(w.shape)) for w in head.trainable_weights) == weights


def test_check_2_what_trains_after_each_unfreezing():
    classifier = tiny_classifier()
    sizes = [sum(int(np.prod(w.shape)) for layer in group for w in layer.trainable_weights)
             for group in classifier.layer_groups()]  # fmt: skip
    assert [group[0].name for group in classifier.layer_groups()] == [
        "embedding", "lstm_1", "lstm_2", "lstm_3", "head",
    ]  # fmt: skip
    assert sum(sizes) == sum(int(np.prod(w.shape)) for w in classifier.trainable_weights)
    published = [62_652, 2_545_852, 13_135_052, 20_274_252, 44_275_052]
    biases = [0, 1600, 1600 + 4600, 1600 + 2 * 4600, 1600 + 2 * 4600]
    ours = [62_652, 4 * 400 * (1150 + 400 + 1), 4 * 1150 * (1150 + 1150 + 1), 4 * 1150 * (400 + 1150 + 1), 60_002 * 400]
    assert np.cumsum(ours).tolist() == [n - b for n, b in zip(published, biases)]


# Check 5: the published fixture


def published(**options):
    model = tiny(pad_id=None, **options)
    names = {"embedding/embeddings": fixture("encoder.weight", (13, 6)), "decoder/bias": fixture("decoder.bias", (13,))}
    sizes = [(6, 9), (9, 9), (9, 6)]
    for i, (n, h) in enumerate(sizes):
        part = f"rnns.{i}."
        names[f"lstm_{i + 1}/lstm_cell/kernel"] = fixture(part + "weight_ih", (4 * h, n)).T
        names[f"lstm_{i + 1}/lstm_cell/recurrent_kernel"] = fixture(part + "weight_hh", (4 * h, h)).T
        names[f"lstm_{i + 1}/lstm_cell/bias"] = fixture(part + "bias_ih", (4 * h,)) + fixture(
            part + "bias_hh", (4 * h,)
        )
        names |= {f"carried/{of}{s}_{i + 1}": np.zeros((128, h)) for s in "hc" for of in ("", "evaluated_")}
    set_weights_by_path(model, names)
    return model


def test_check_5_logits_and_penalties():
    model = published()
    h, raw, states = model.encoder(TOKENS)
    last = [-0.119677, 0.035205, -0.142341, 0.225540, -0.147150, 0.127102]
    assert_close(h[0, -1], np.array(last), 2e-6, "h_T")
    assert_close(states[-1][0][0], np.array(last), 2e-6, "the last state")
    logits = model.predict_on_batch({"token_ids": TOKENS})
    assert_close(logits[0, -1, :4], np.array([0.451734, -0.437247, -0.413097, -0.178319]), 2e-6, "logits")
    for alpha, beta, expected in ((2.0, 0.0, 0.024806), (0.0, 1.0, 0.000526)):
        model.activation_penalty, model.temporal_penalty = alpha, beta
        assert_close(model.penalty(h, raw, TOKENS), np.array(expected), 1e-6, "penalty")


def test_check_5_concat_pooling():
    h, _, _ = published().encoder(TOKENS)
    expected = [-0.119677, 0.035205, -0.142341, 0.225540, -0.147150, 0.127102,
                -0.067978, 0.035205, -0.060025, 0.225540, -0.054055, 0.127102,
                -0.103639, -0.005051, -0.107212, 0.158934, -0.111787, 0.075097]  # fmt: skip
    assert_close(llmfound.ops.concat_pool(h)[0], np.array(expected), 2e-6)
    assert_close(llmfound.ops.concat_pool(h, np.ones((2, 6), bool))[0], np.array(expected), 2e-6)


def test_pooling_counts_beyond_what_float16_does():
    x, mask = ops.ones((1, 5000, 2), "float16"), ops.ones((1, 5000), "bool")
    assert_close(llmfound.ops.concat_pool(x, mask), np.ones((1, 6)), 1e-3)


def test_penalties_do_not_see_padding():
    model = published()
    model.encoder.pad_id = 0
    h, raw = fixture("h", (2, 5, 6)).astype("float32"), fixture("raw", (2, 5, 6)).astype("float32")
    ids = np.array([[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]])
    squares = np.concatenate([h[0, :3].ravel(), h[1].ravel()]) ** 2
    steps = np.concatenate([np.diff(raw[0, :3], axis=0).ravel(), np.diff(raw[1], axis=0).ravel()]) ** 2
    assert_close(model.penalty(ops.convert_to_tensor(h), ops.convert_to_tensor(raw), ops.convert_to_tensor(ids)),
                 2 * squares.mean() + steps.mean(), 1e-6)  # fmt: skip


# Check 6: dropouts


def test_check_6_variational_and_embedding_dropout():
    x, ids = np.ones((4, 50, 40), "float32"), np.tile(np.arange(100).reshape(4, 25), 2)
    locked = numpy(llmfound.layers.VariationalDropout(0.4)(x, training=True))
    assert (locked == locked[:, :1]).all() and not (locked[0] == locked[1]).all()
    assert set(np.unique(np.round(locked, 3))) == {0, np.float32(1.667)}
    layer = llmfound.layers.EmbeddingDropout(100, 0.3)
    words = numpy(layer(x, ids, training=True))
    assert (words == words[..., :1]).all()  # a word as a whole
    assert (words[:, :25] == words[:, 25:]).all()  # wherever it stands
    assert 0.1 < (words[:, :25, 0] == 0).mean() < 0.5
    assert not (numpy(layer(x, ids, training=True)) == words).all()
    assert (numpy(layer(x, ids)) == x).all()


def test_the_decoder_does_not_see_the_words_that_are_dropped():
    """The output's matrix is E itself, so that its gradient reaches words that embedding dropout took out."""
    model = tiny(embedding_dropout=0.9, pad_id=None)
    logits = numpy(model({"token_ids": TOKENS}, training=True))
    bias = numpy(model.decoder.bias)
    assert np.abs(logits - bias).min() > 0


# State that is carried from window to window


def test_windows_that_go_on_are_one_text():
    model = tiny(weight_dropout=0.5)
    text = np.random.default_rng(0).integers(1, 13, (3, 20)).astype("int32")
    whole = model.predict_on_batch({"token_ids": text})
    flags = np.ones(3, "int32")
    parts = [model.predict_on_batch({"token_ids": text[:, a:b], "continues": flags * (a > 0)})
             for a, b in ((0, 7), (7, 8), (8, 20))]  # fmt: skip
    assert_close(np.concatenate(parts, axis=1), whole, 1e-5)
    alone = model.predict_on_batch({"token_ids": text[:, 8:], "continues": flags * 0})
    assert_close(alone, model.predict_on_batch({"token_ids": text[:, 8:]}), 1e-6)
    mixed = model.predict_on_batch({"token_ids": text[:, :4], "continues": np.array([1, 0, 1], "int32")})
    assert np.abs(mixed[0] - whole[0, :4]).max() > 1e-3 and np.abs(mixed[1] - whole[1, :4]).max() < 1e-5


def test_padding_in_a_window_does_not_move_the_state():
    model = tiny()
    text = np.random.default_rng(0).integers(1, 13, (2, 9)).astype("int32")
    gap = np.concatenate([text[:, :5], np.zeros((2, 3), "int32")], axis=1)
    model.predict_on_batch({"token_ids": gap, "continues": np.zeros(2, "int32")})
    after = model.predict_on_batch({"token_ids": text[:, 5:], "continues": np.ones(2, "int32")})
    assert_close(after, model.predict_on_batch({"token_ids": text})[:, 5:], 1e-5)


def test_fit_carries_the_state_and_validation_starts_anew():
    ids = np.random.default_rng(0).integers(1, 13, 500)
    model = tiny()
    model.compile(keras.optimizers.SGD(0.0), LOSS, metrics=[Perplexity()])
    train = LanguageModelBatches(ids, 4, 10, variable=False)
    valid = LanguageModelBatches(ids[:100], 2, 10, variable=False)
    history = model.fit(train, validation_data=valid, epochs=2, verbose=0).history
    assert_close(history["perplexity"][0], history["perplexity"][1], 1e-6)  # nothing was learned: each epoch is equal
    token_ids, labels = (np.concatenate(rows, axis=1) for rows in zip(*((x["token_ids"], y) for x, y in train)))
    logits = model.predict_on_batch({"token_ids": token_ids})
    metric = Perplexity()
    metric.update_state(labels, logits)
    assert_close(history["perplexity"][0], metric.result(), 1e-5)
    assert_close(model.evaluate(valid, verbose=0)[1], history["val_perplexity"][0], 1e-5)


def test_a_validation_in_the_middle_of_a_text_does_not_lead_on():
    text, other = (np.random.default_rng(i).integers(1, 13, n) for i, n in enumerate((401, 201)))
    losses = []
    for valid in (None, LanguageModelBatches(other, 4, 10, variable=False)):
        keras.utils.set_random_seed(0)
        model = tiny()
        model.compile(keras.optimizers.SGD(0.0), LOSS)
        train = LanguageModelBatches(text, 4, 10, variable=False)
        losses.append(model.fit(train, epochs=2, steps_per_epoch=5, validation_data=valid, verbose=0).history["loss"])
    assert_close(losses[1], losses[0], 1e-6)


def test_windows_are_never_shuffled():
    batches = LanguageModelBatches(np.arange(1, 13), 1, 5)
    model = tiny()
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="must be read in order; leave out shuffle=True"):
        model.fit(batches, shuffle=True, verbose=0)


def test_carried_states_are_not_saved(tmp_path):
    model, other = tiny(max_batch=5), tiny(max_batch=7)
    model.predict_on_batch({"token_ids": TOKENS, "continues": np.zeros(2, "int32")})
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    inputs = {"token_ids": TOKENS}
    assert_close(other.predict_on_batch(inputs), model.predict_on_batch(inputs), 1e-6)


def test_a_fresh_model_knows_nothing():
    model = ULMFiT(1000, **NO_DROPOUT)  # check 10
    ids = np.random.default_rng(0).integers(1, 1000, (4, 20))
    logits = model.predict_on_batch({"token_ids": ids.astype("int32")}).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert abs(-np.take_along_axis(log_p, ids[..., None], -1).mean() - np.log(1000)) < 0.05


# Check 9: long texts


def test_check_9_windows_do_not_change_what_is_pooled():
    text = np.random.default_rng(0).integers(1, 13, (2, 200)).astype("int32")
    one, many = (tiny_classifier(window=n) for n in (200, 70))
    many.set_weights(one.get_weights())
    assert_close(many.predict_on_batch({"token_ids": text}), one.predict_on_batch({"token_ids": text}), 1e-5)


def gradient_of_each_position(classifier, text):
    """float (batch, length), how much the loss depends on each position: every position has a word of its own."""
    weights = numpy(classifier.encoder.embedding.embeddings)
    classifier.compile(keras.optimizers.SGD(1.0), LOSS)
    classifier.train_on_batch({"token_ids": text}, np.array([0, 1][: len(text)]))
    moved = np.abs(numpy(classifier.encoder.embedding.embeddings) - weights).sum(-1)
    return moved[text]


def test_check_9_gradients_reach_only_the_windows_that_are_pooled():
    text = np.arange(1, 201).reshape(1, 200).astype("int32")
    text = np.concatenate([text, np.pad(text[:, :95] + 200, ((0, 0), (0, 105)))])  # the second row: padding behind
    classifier = tiny_classifier(tiny(vocab_size=400), window=30, max_windows=2)
    moved = gradient_of_each_position(classifier, text)
    assert (moved[0, :150] == 0).all() and (moved[0, 150:] > 0).all()  # windows 5 and 6 of 0 to 6
    assert (moved[1, :60] == 0).all() and (moved[1, 60:95] > 0).all()  # windows 2 and 3 of 0 to 3
    assert (moved[text == 0] == 0).all()


@pytest.mark.parametrize("side", ["right", "left", "between"])
def test_check_9_padding_changes_nothing(side):
    text = np.random.default_rng(0).integers(1, 13, (2, 9)).astype("int32")
    zeros = np.zeros((2, 4), "int32")
    parts = dict(right=[text, zeros], left=[zeros, text], between=[text[:, :3], zeros, text[:, 3:]])[side]
    classifier = tiny_classifier()
    padded = classifier.predict_on_batch({"token_ids": np.concatenate(parts, axis=1)})
    assert_close(padded, classifier.predict_on_batch({"token_ids": text}), 1e-5)


def test_a_text_without_words_is_classified_as_zeros():
    classifier = tiny_classifier()
    found = classifier.predict_on_batch({"token_ids": np.zeros((2, 3), "int32")})
    head = classifier.head
    expected = head.output_classes(head.hidden_norm(head.hidden(head.norm(np.zeros((2, 18), "float32")))))
    assert_close(found, expected, 1e-6)


# Forward and backward


def test_a_reverse_classifier_reads_from_the_end():
    model = tiny()
    forward, backward = tiny_classifier(model), tiny_classifier(model, reverse=True)
    backward.head.set_weights(forward.head.get_weights()) if backward.head.built else None
    backward.set_weights(forward.get_weights())
    text = np.array([[5, 6, 7, 8, 0], [1, 2, 3, 0, 0]], "int32")
    turned = np.array([[8, 7, 6, 5, 0], [3, 2, 1, 0, 0]], "int32")
    assert_close(backward.predict_on_batch({"token_ids": text}), forward.predict_on_batch({"token_ids": turned}), 1e-5)


def test_check_10_an_ensemble_of_equal_models_is_the_model():
    classifier, inputs = tiny_classifier(), {"token_ids": TOKENS}
    twice = Ensemble([classifier, classifier])
    logits = classifier.predict_on_batch(inputs)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_close(np.exp(twice.predict_on_batch(inputs)), probabilities, 1e-6)
    assert twice.optional_inputs() == classifier.optional_inputs()
    other = tiny_classifier()
    both = np.exp(Ensemble([classifier, other]).predict_on_batch(inputs))
    logits = other.predict_on_batch(inputs)
    assert_close(both, (probabilities + np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)) / 2, 1e-6)


# Vocabulary


def test_another_vocabulary_takes_known_rows_and_the_mean():
    model = tiny(vocab_size=4)
    new = model.with_vocabulary(["a", "b", "c", "d"], ["d", "x", "a"])
    old, rows = (numpy(m.encoder.embedding.embeddings) for m in (model, new))
    assert_close(rows, np.stack([old[3], old.mean(0), old[0]]), 1e-6)
    assert new.vocab_size == 3 and new.decoder.bias.shape == (3,)
    for ours, theirs in zip(new.encoder.lstms, model.encoder.lstms):
        assert_close(ours.get_weights(), theirs.get_weights(), 0)


def test_another_vocabulary_of_the_same_size_moves_rows_too():
    model = tiny(vocab_size=3)
    new = model.with_vocabulary(["a", "b", "c"], ["c", "b", "a"])
    assert_close(new.encoder.embedding.get_weights()[0], model.encoder.embedding.get_weights()[0][::-1], 0)


def test_another_vocabulary_brings_its_padding_and_its_own_names_of_special_words():
    old = ["xxunk", "xxpad", "xxbos", "the", "film"]
    words = WordTokenizer.train(["the film was good"] * 2, 20)
    model = tiny(vocab_size=5, pad_id=1)
    new = model.with_vocabulary(old, words)
    assert new.pad_id == words.pad_id == 0
    before, after = (numpy(m.encoder.embedding.embeddings) for m in (model, new))
    for ours, theirs in {"[UNK]": 0, "[PAD]": 1, "[START]": 2, "the": 3}.items():
        assert_close(after[words.vocabulary.index(ours)], before[theirs], 0, ours)
    assert model.with_vocabulary(old, ["a", "b", "xxpad"]).pad_id == 2
    assert tiny(vocab_size=5, pad_id=None).with_vocabulary(old, words).pad_id is None


@pytest.mark.parametrize("filler", ["xxfake", ""])
def test_what_fills_a_vocabulary_up_may_stand_more_than_once(filler):
    model = tiny(vocab_size=5)
    new = model.with_vocabulary(["a", "b", *[filler] * 3], ["b", "a", filler, filler])
    before, after = (numpy(m.encoder.embedding.embeddings) for m in (model, new))
    assert_close(after, before[[1, 0, 4, 4]], 0)


@pytest.mark.parametrize("old, new, message", [
    (["a", "b"], ["a"], "old has 2 words, and the model 3"),
    (["a", "b", "a"], ["a"], "'a' stands twice"),
    (["a", "b", "c"], ["x", "x"], "'x' stands twice"),
])  # fmt: skip
def test_vocabularies_that_do_not_fit(old, new, message):
    with pytest.raises(ValueError, match=message):
        tiny(vocab_size=3).with_vocabulary(old, new)


# Training


def test_check_4_one_step_moves_groups_in_the_ratio_of_their_rates():
    classifier = tiny_classifier()
    groups = classifier.layer_groups()
    optimizer = DiscriminativeSGD(0.01, groups)
    before = [numpy(w).copy() for w in classifier.trainable_weights]
    optimizer.build(classifier.trainable_weights)
    optimizer.apply([ops.ones(w.shape) for w in classifier.trainable_weights], classifier.trainable_weights)
    moved = {w.path: float((b - numpy(w)).mean()) for b, w in zip(before, classifier.trainable_weights)}
    expected = [2.188298729e-4, 5.689576695e-4, 1.479289941e-3, 3.846153846e-3, 1e-2]
    for group, rate in zip(groups, expected):
        for weight in group[0].trainable_weights:
            assert abs(moved[weight.path] / rate - 1) < 1e-3, weight.path
    assert_close(np.array(optimizer.group_rates), np.array(expected), 1e-7)


def test_check_10_gradual_unfreezing_keeps_what_waits(capsys):
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(1, 13, (12, 8)).astype("int32"), rng.integers(0, 3, 12)
    classifier = tiny_classifier(tiny(weight_dropout=0.2, hidden_dropout=0.2))
    classifier.compile(DiscriminativeAdam(0.01, classifier.layer_groups(), beta_1=0.7, beta_2=0.99), LOSS)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append([[numpy(w).copy() for w in g[0].trainable_weights] for g in self.model.layer_groups()])

    seen.append([[numpy(w).copy() for w in g[0].trainable_weights] for g in classifier.layer_groups()])
    classifier.fit({"token_ids": ids}, labels, batch_size=4, epochs=6, verbose=0,
                   callbacks=[GradualUnfreezing(), Look()])  # fmt: skip
    for epoch, (old, new) in enumerate(itertools.pairwise(seen), 1):
        for group in range(5):
            same = all((a == b).all() for a, b in zip(old[group], new[group]))
            assert same == (group < 5 - epoch), f"group {group} in epoch {epoch}"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 1: training head at 1.00e-02; waiting: embedding, lstm_1, lstm_2, lstm_3"
    assert lines[1] == "epoch 2: training lstm_3 at 3.85e-03 and head at 1.00e-02; waiting: embedding, lstm_1, lstm_2"
    assert lines[4].startswith(
        "epoch 5: training embedding at 2.19e-04, lstm_1 at 5.69e-04, lstm_2 at 1.48e-03, lstm_3"
    )
    assert len(lines) == 5


def test_a_model_learns_a_text():
    keras.utils.set_random_seed(0)
    ids = np.tile([1, 2, 3, 4, 5, 6, 7], 60)
    model = tiny(embedding_dim=16, hidden_dim=24, num_layers=2, **NO_PENALTY)
    model.compile(keras.optimizers.Adam(0.03), SmoothedCrossEntropy(0.0), metrics=[Perplexity()])
    history = model.fit(LanguageModelBatches(ids, 4, 10), epochs=15, verbose=0).history
    assert history["perplexity"][-1] < 1.5 < history["perplexity"][0]


def test_check_model():
    batch = ({"token_ids": TOKENS + (TOKENS == 0)}, np.roll(TOKENS, -1, axis=1))
    check_model(lambda: tiny(weight_dropout=0.1, embedding_dropout=0.1, output_dropout=0.1), batch)


def test_check_model_of_the_classifier():
    check_model(
        lambda: tiny_classifier(tiny(weight_dropout=0.1), dropout=0.1), ({"token_ids": TOKENS}, np.array([0, 2]))
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_windows_begin_with_the_text_wherever_padding_is(reverse):
    """Of a text longer than what is pooled, however much padding its batch gives it, and on which side."""
    model = tiny_classifier(window=4, max_windows=2, reverse=reverse)
    text = np.random.default_rng(0).integers(1, 13, (1, 11)).astype("int32")
    expected = model(text)
    for left, right in ((0, 1), (0, 3), (2, 0), (1, 2)):
        padded = np.pad(text, ((0, 0), (left, right)))
        assert_close(model(padded), expected, 1e-5)
        pooled = model.pooled(model.placed(ops.convert_to_tensor(padded)))
        assert int(ops.sum(ops.cast(pooled, "int32"))) == 4 + 3  # the last windows' words


def test_saving_keeps_groups_and_the_optimizer(tmp_path):
    ids, labels = np.random.default_rng(0).integers(1, 13, (8, 6)).astype("int32"), np.arange(8) % 3
    classifier = tiny_classifier()
    classifier.compile(DiscriminativeAdam(0.01, classifier.layer_groups()), LOSS)
    classifier.optimizer.train([3, 4])
    classifier.fit({"token_ids": ids}, labels, batch_size=4, verbose=0)
    classifier.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(other.optimizer.group_rates, classifier.optimizer.group_rates, 0)
    for model in (classifier, other):
        model.fit({"token_ids": ids}, labels, batch_size=4, verbose=0, shuffle=False)
    assert_close(other.predict_on_batch({"token_ids": ids}), classifier.predict_on_batch({"token_ids": ids}), 1e-5)


def test_classes_may_be_counted_by_numpy(tmp_path):
    classifier = ULMFiTClassifier(tiny(), np.int64(3), hidden_dim=5)
    classifier.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    x = {"token_ids": TOKENS}
    assert_close(other.predict_on_batch(x), classifier.predict_on_batch(x), 1e-6)


@pytest.mark.parametrize("pad_id", (0, None))
def test_decoding_goes_on_from_a_text(pad_id):
    """Step by step what the whole text gives, of texts of unequal lengths, without a word of its own in between."""
    model = tiny(pad_id=pad_id)
    texts = [[1, 2, 3, 4], [5, 6] if pad_id == 0 else [5, 6, 2, 7]]
    inputs = {"token_ids": np.array([text + [0] * (4 - len(text)) for text in texts], "int32")}
    options = dict(max_length=3, start_id=9, end_id=None, forbidden_ids=[0])
    found = decoding.greedy(model, inputs, **options)
    log_probs, _ = decoding.score(model, inputs, found, start_id=9)
    for text, words, logs in zip(texts, found.tolist(), log_probs):
        for word, log_prob in zip(words, logs):
            logits = ops.convert_to_numpy(model({"token_ids": np.array([text], "int32")}))[0, -1]
            assert_close(log_prob, (logits - np.log(np.exp(logits).sum()))[word], 1e-5)
            assert word == 1 + logits[1:].argmax()
            text.append(word)
    if pad_id == 0:
        beams = decoding.beam_search(model, inputs, 2, length_penalty=0.0, n_best=1, **options)
        _, sums = decoding.score(model, inputs, beams.token_ids[:, 0], start_id=9)
        assert_close(beams.scores[:, 0], sums, 1e-4)


def test_decoding_from_no_text_begins_with_the_start_token():
    model = tiny()
    found = decoding.greedy(model, {"token_ids": np.zeros((1, 3), "int32")}, max_length=3, start_id=4, end_id=None)
    after = decoding.greedy(model, {"token_ids": np.array([[4]], "int32")}, max_length=3, start_id=4, end_id=None)
    assert (found == after).all()


# Bad input


@pytest.mark.parametrize("make, message", [
    (lambda: tiny(hidden_dim=0), "Sizes must be positive"),
    (lambda: tiny(weight_dropout=1.0), "at least 0 and below 1"),
    (lambda: tiny(temporal_penalty=-1.0), "Penalties must not be negative"),
    (lambda: tiny(max_batch=0), "max_batch must be positive"),
    (lambda: tiny_classifier(window=0), "window and max_windows must be positive"),
    (lambda: ULMFiTClassifier(tiny(), 1), "num_classes must be at least 2"),
    (lambda: Ensemble([]), "at least one classifier"),
])  # fmt: skip
def test_arguments_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_that_cannot_go_on():
    model = tiny(max_batch=1)
    with pytest.raises(ValueError, match="has 2 rows, and this model carries the states of 1; build it with max_batch"):
        model.predict_on_batch({"token_ids": TOKENS, "continues": np.zeros(2, "int32")})
    rows = {"token_ids": np.repeat(TOKENS[:1], 3, axis=0), "continues": np.zeros(3, "int32")}
    assert len(model.predict(rows, batch_size=1, verbose=0)) == 3
    with pytest.raises(ValueError, match="an entry for each row"):
        model.predict_on_batch({"token_ids": TOKENS, "continues": np.zeros(3, "int32")})
    with pytest.raises(ValueError, match="ids from 0 to 12; got 0 to 13"):
        model.predict_on_batch({"token_ids": np.array([[0, 13]], "int32")})
