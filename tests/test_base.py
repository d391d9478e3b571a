"""Layer and Model: configs, models that are built at once, checks of inputs, files."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import llmfound
from llmfound.base import lean
from llmfound.layers import Dense, FeedForward, LayerNormalization
from llmfound.testing import assert_close, fixture

X = fixture("x", (2, 4, 8)).astype("float32")
IDS = {"token_ids": np.array([[1, 2, 3], [4, 0, 2]], "int32")}


class Affine(llmfound.Layer):
    def __init__(self, factor, offset=0.0, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.offset = factor, offset

    def call(self, x):
        return x * self.factor + self.offset


class Halving(Affine):
    """Without a constructor of its own."""


class Doubling(Affine):
    """With another signature than its parent's, and the rest passed on."""

    def __init__(self, shift, **kwargs):
        super().__init__(2.0, shift + 1, **kwargs)


class Handing(Affine):
    """Hands on what it does not know."""

    def __init__(self, *args, extra=1, **kwargs):
        super().__init__(*args, **kwargs)


class First(Handing):
    """Has an argument of its own before those that it hands on."""

    def __init__(self, shift, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Chain(llmfound.Layer):
    """Takes other layers as arguments: one, some in a list, some in a dict."""

    def __init__(self, first, rest=(), named=None, **kwargs):
        super().__init__(**kwargs)
        self.first, self.rest, self.named = first, list(rest), dict(named or {})

    def call(self, x):
        for layer in [self.first, *self.rest, *self.named.values()]:
            x = layer(x)
        return x


class Counting(Chain):
    """Counts its calls."""

    calls = 0

    def call(self, x):
        Counting.calls += 1
        return super().call(x)


class Raw(llmfound.Layer):
    """Owns a weight, beside a sublayer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(8, name="dense", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return self.dense(x) * self.scale


class Bag(llmfound.Model):
    """Scores the next token from this one alone."""

    def __init__(self, vocab_size, hidden_dim=4, initializer="uniform", **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.embedding = keras.layers.Embedding(vocab_size, hidden_dim, initializer, name="embedding")
        self.dense = keras.layers.Dense(vocab_size, name="dense")

    def input_signature(self):
        return {"token_ids": (None,)}

    def input_limits(self):
        return {"token_ids": self.vocab_size}

    def call(self, inputs):
        return self.dense(self.embedding(inputs["token_ids"]))


class Deep(Bag):
    """Adds a layer after its parent's constructor has finished."""

    def __init__(self, vocab_size, **kwargs):
        super().__init__(vocab_size, **kwargs)
        self.top = keras.layers.Dense(2, name="top")

    def call(self, inputs):
        return self.top(super().call(inputs))


class Pair(llmfound.Model):
    """Two inputs, of a fixed and of any length, on top of a model that it takes as an argument."""

    def __init__(self, bag, **kwargs):
        super().__init__(**kwargs)
        self.bag = bag

    def input_signature(self):
        return {"token_ids": (None,), "segment_ids": (3,)}

    def call(self, inputs):
        segments = ops.sum(ops.cast(inputs["segment_ids"], "float32"), axis=1)
        return self.bag({"token_ids": inputs["token_ids"]}) + segments[:, None, None]


def numpy(x):
    return ops.convert_to_numpy(x)


def through_json(thing):
    return keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(thing))))


def compiled(model, rate=0.1):
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


# Config


@pytest.mark.parametrize(
    "layer, expected",
    [
        (Affine(3.0), dict(factor=3.0)),
        (Affine(3.0, 1.0), dict(factor=3.0, offset=1.0)),
        (Affine(offset=1.0, factor=3.0, name="line", trainable=False), dict(factor=3.0, offset=1.0, name="line")),
        (Halving(0.5), dict(factor=0.5)),
        (Doubling(3), dict(shift=3)),
        (Doubling(shift=3, name="twice"), dict(shift=3, name="twice")),
        (Handing(3.0, 1.0, extra=2), dict(factor=3.0, offset=1.0, extra=2)),
        (First(4, 3.0, offset=1.0), dict(shift=4, factor=3.0, offset=1.0)),
    ],
)
def test_the_config_is_the_arguments(layer, expected):
    own = {name: value for name, value in layer.get_config().items() if name not in ("dtype", "trainable")}
    assert own == {"name": layer.name, **expected}
    for twin in (type(layer).from_config(layer.get_config()), through_json(layer)):
        assert type(twin) is type(layer)
        assert (twin.factor, twin.offset, twin.name) == (layer.factor, layer.offset, layer.name)
        assert twin.trainable == layer.trainable


def test_the_config_has_dtype_and_trainable_as_they_are_now():
    layer = Affine(1.0, dtype="mixed_bfloat16", trainable=True)
    layer.trainable = False
    twin = through_json(layer)
    assert twin.trainable is False
    assert twin.compute_dtype == "bfloat16" and twin.variable_dtype == "float32"


def test_arguments_that_are_objects():
    layer = FeedForward(
        8, 16, activation=keras.ops.tanh, kernel_initializer=keras.initializers.RandomNormal(stddev=0.5)
    )
    expected, twin = layer.expand, through_json(layer).expand
    assert twin.kernel_initializer.get_config() == expected.kernel_initializer.get_config()
    assert isinstance(twin.kernel_initializer, keras.initializers.RandomNormal)
    assert_close(twin.activation(X), np.tanh(X))


def test_layers_as_arguments():
    parts = dict(rest=[FeedForward(8, 16), Affine(2.0)], named={"last": keras.layers.Dense(8, name="last")})
    layer = Chain(keras.layers.Dense(8, name="first"), **parts, name="chain")
    expected = layer(X)
    for twin in (Chain.from_config(layer.get_config()), through_json(layer)):
        twin(X)
        assert [type(part) for part in twin.rest] == [FeedForward, Affine] and twin.named["last"].name == "last"
        twin.set_weights(layer.get_weights())
        assert_close(twin(X), expected)


def test_a_layer_among_its_own_kind_survives_a_file(tmp_path):
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, Chain(Raw(), [FeedForward(8, 16)])(inputs))
    model.save(tmp_path / "model.keras")
    assert_close(keras.saving.load_model(tmp_path / "model.keras")(X), model(X), tolerance=0)


@pytest.mark.parametrize("make", [lambda: FeedForward(8, 16), Raw, lambda: Chain(FeedForward(8, 16), [Raw()])])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_has_weights_of_its_own(make, copied):
    layer = make()
    expected = numpy(layer(X))
    twin = copied(layer)
    names = [["/".join(w.path.split("/")[-2:]) for w in each.weights] for each in (layer, twin)]
    assert names[0] == names[1]
    assert_close(twin(X), expected, tolerance=0)
    twin.set_weights([w + 1 for w in twin.get_weights()])
    assert_close(layer(X), expected, tolerance=0)


def test_a_copy_of_a_layer_that_was_never_called():
    assert copy.deepcopy(Chain(FeedForward(8, 16)))(X).shape == X.shape


@pytest.mark.parametrize(
    "arguments, message",
    [((), "missing 1 required positional argument: 'factor'"), ((1, 2, 3), "takes from 2 to 3 positional arguments")],
)
def test_wrong_arguments_get_the_message_of_python(arguments, message):
    with pytest.raises(TypeError, match=message):
        Affine(*arguments)


def test_classes_are_registered_under_their_package():
    assert keras.saving.get_registered_name(FeedForward) == "llmfound>FeedForward"
    assert keras.saving.get_registered_name(Doubling) == f"{__name__}>Doubling"


# Models


def test_a_model_has_its_weights_once_constructed():
    assert {w.path.split("/", 1)[1] for w in Bag(5).weights} == {"embedding/embeddings", "dense/kernel", "dense/bias"}
    assert Deep(5).count_params() == Bag(5).count_params() + 5 * 2 + 2
    assert Pair(Bag(5)).count_params() == Bag(5).count_params()


def test_a_model_without_input_signature():
    class Nameless(llmfound.Model):
        pass

    with pytest.raises(NotImplementedError, match="Nameless must define input_signature"):
        Nameless()


def test_the_config_of_a_model():
    model = Deep(5, initializer=keras.initializers.Constant(2.0), name="deep")
    twins = [Deep.from_config(model.get_config()), through_json(model), keras.models.clone_model(model)]
    for twin in twins:
        assert type(twin) is Deep and (twin.name, twin.vocab_size) == ("deep", 5)
        assert (twin.get_weights()[0] == 2).all()
        twin.set_weights(model.get_weights())
        assert_close(twin(IDS), model(IDS), tolerance=0)


def test_a_model_as_an_argument(tmp_path):
    model = Pair(Bag(5))
    inputs = {**IDS, "segment_ids": np.ones((2, 3), "int32")}
    assert_close(model(inputs), numpy(model.bag(IDS)) + 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.bag) is Bag
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(twin(inputs), model(inputs), tolerance=0)


def test_a_compiled_model_goes_on_from_its_file_as_if_never_saved(tmp_path):
    model, labels = compiled(Bag(5)), IDS["token_ids"][:, ::-1]
    model.train_on_batch(IDS, labels)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.get_weights(), model.get_weights(), tolerance=0)
    losses = [[float(m.train_on_batch(IDS, labels)) for _ in range(2)] for m in (model, loaded)]
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]
    assert_close(loaded.get_weights(), model.get_weights(), tolerance=0)
    assert int(loaded.optimizer.iterations) == 3


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "model.keras"
    Bag(5).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.keras.* zip file"):
        keras.saving.load_model(path)


def test_truncated_weights_are_refused_and_change_nothing(tmp_path):
    path, model = tmp_path / "model.weights.h5", Bag(5)
    model.save_weights(path)
    path.write_bytes(path.read_bytes()[:-1])
    other = Bag(5)
    before = other.get_weights()
    with pytest.raises(OSError, match="truncated file"):
        other.load_weights(path)
    assert_close(other.get_weights(), before, tolerance=0)


@keras.saving.register_keras_serializable("test_base")
class Around(keras.Model):
    """A model of Keras's own that holds one of ours, as a user writes it."""

    def __init__(self, inside, **kwargs):
        super().__init__(**kwargs)
        self.inside, self.head = inside, keras.layers.Dense(2)

    def call(self, token_ids, training=None):
        return self.head(self.inside(token_ids, training=training))

    def get_config(self):
        return {**super().get_config(), "inside": keras.saving.serialize_keras_object(self.inside)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "inside": keras.saving.deserialize_keras_object(config["inside"])})


def test_a_model_around_this_one_is_saved_whole(tmp_path):
    for inside in (Bag(5), llmfound.models.BERTClassifier(llmfound.models.BERT(5, 1, 4, 2, 8), 3)):
        model = Around(inside)
        expected = numpy(model(IDS["token_ids"]))
        model.save(tmp_path / "model.keras")
        assert_close(keras.saving.load_model(tmp_path / "model.keras")(IDS["token_ids"]), expected, tolerance=0)


# Checks of inputs

LABELS = np.zeros((2, 3), "int32")
WAYS = {
    "call": lambda model, x: model(x),
    "fit": lambda model, x: model.fit(x, LABELS, verbose=0),
    "fit(x=)": lambda model, x: model.fit(x=x, y=LABELS, verbose=0),
    "evaluate": lambda model, x: model.evaluate(x, LABELS, verbose=0),
    "predict": lambda model, x: model.predict(x, verbose=0),
    "train_on_batch": lambda model, x: model.train_on_batch(x, LABELS),
    "test_on_batch": lambda model, x: model.test_on_batch(x, LABELS),
    "predict_on_batch": lambda model, x: model.predict_on_batch(x),
}
BAD = {
    "float": (dict(token_ids=np.ones((2, 3), "float32")), r"token_ids must hold integers; got float32, shape \(2, 3\)"),
    "bool": (dict(token_ids=np.ones((2, 3), bool)), r"token_ids must hold integers; got bool, shape \(2, 3\)"),
    "list": (dict(token_ids=[[1, 2, 3]]), r"token_ids must hold integers; got object, shape \(1, 3\)"),
    "rank": (dict(token_ids=np.ones(3, "int32")), r"token_ids must be of shape \('batch', None\); got \(3,\)"),
    "large": (dict(token_ids=np.array([[1, 5, 2]] * 2)), "token_ids must hold ids from 0 to 4; got 1 to 5"),
    "negative": (dict(token_ids=np.array([[1, -1, 2]] * 2)), "token_ids must hold ids from 0 to 4; got -1 to 2"),
    "empty": (dict(token_ids=np.ones((0, 3), "int32")), r"token_ids is empty: shape \(0, 3\)"),
    "missing": (dict(segment_ids=LABELS), r"Bag also needs \['token_ids'\]; got \['segment_ids'\]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_array_alone_is_the_input_of_a_model_that_needs_one(way):
    losses = []
    for x in (IDS, IDS["token_ids"]):
        keras.utils.set_random_seed(0)
        model = compiled(Bag(5))
        found = WAYS[way](model, x)
        losses.append([getattr(found, "history", {"": found}), model.get_weights()])
    assert_close(losses[1], losses[0], tolerance=0)


def test_batches_of_an_array_alone():
    losses = []
    for x in (IDS, IDS["token_ids"]):
        keras.utils.set_random_seed(0)
        batches = ((x, LABELS) for _ in range(3))
        losses.append(compiled(Bag(5)).fit(batches, steps_per_epoch=3, shuffle=False, verbose=0).history["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="Pair takes a dict of arrays"):
        compiled(Pair(Bag(5))).fit(((x, LABELS) for _ in range(3)), steps_per_epoch=3, shuffle=False, verbose=0)


class Shaped(keras.utils.PyDataset):
    """Has a shape and a dtype, as an array does."""

    shape, dtype = (2, 3), "int32"

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.inputs, LABELS


@pytest.mark.parametrize("make", (lambda: Bag(5), lambda: Pair(Bag(5))), ids=("one input", "two inputs"))
def test_a_dataset_that_has_a_shape_is_no_array(make):
    model = compiled(make())
    data = Shaped(dict.fromkeys(model.input_signature(), IDS["token_ids"]))
    model.fit(data, verbose=0)
    assert_close(model.evaluate(data, verbose=0), model.test_on_batch(*data[0]))


def test_a_users_dataset_may_have_an_attribute_shuffle():
    batches = Shaped(IDS)
    batches.shuffle = True
    assert Bag(5).predict(batches, verbose=0).shape == (6, 3, 5)


def test_an_array_alone_is_refused_where_two_are_needed():
    for x in (IDS["token_ids"], [IDS["token_ids"]] * 2, (IDS["token_ids"],) * 2):
        with pytest.raises(
            ValueError, match=r"Pair takes a dict of arrays, token_ids, segment_ids; got (ndarray|list|tuple)"
        ):
            Pair(Bag(5))(x)


def test_a_model_of_one_input_in_a_sequence_of_layers():
    model = Bag(5)
    inputs = keras.Input((None,), dtype="int32")
    assert_close(keras.Sequential([inputs, model])(IDS["token_ids"]), model(IDS), tolerance=0)
    assert_close(keras.Model(inputs, model(inputs))(IDS["token_ids"]), model(IDS), tolerance=0)


@pytest.mark.parametrize("way", WAYS)
def test_bad_inputs_are_refused_and_change_nothing(way):
    model = compiled(Bag(5))
    before = [numpy(model(IDS)), *model.get_weights()]
    for bad, message in BAD.values():
        with pytest.raises(ValueError, match=message):
            WAYS[way](model, bad)
        assert_close([model(IDS), *model.get_weights()], before, tolerance=0)


def test_bad_validation_data_is_refused():
    model = compiled(Bag(5))
    for bad in ("float", "large", "negative", "missing"):
        inputs, message = BAD[bad]
        with pytest.raises(ValueError, match=message):
            model.fit(IDS, LABELS, validation_data=(inputs, LABELS), verbose=0)


def test_tensors_are_checked_as_far_as_that_is_free():
    model = Bag(5)
    for bad in ("float", "bool", "rank"):
        inputs, message = BAD[bad]
        with pytest.raises(ValueError, match=message):
            model({name: ops.convert_to_tensor(x) for name, x in inputs.items()})


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_integers_of_any_width_are_accepted(dtype):
    model = Bag(5)
    assert_close(model({"token_ids": IDS["token_ids"].astype(dtype)}), model(IDS), tolerance=0)


def test_only_the_sign_is_checked_where_no_limit_is_known():
    model = Pair(Bag(5))
    large = {**IDS, "segment_ids": np.full((2, 3), 10**6, "int32")}
    assert numpy(model(large)).min() > 10**5
    with pytest.raises(ValueError, match=r"segment_ids must hold ids from 0 to .*; got -1 to -1"):
        model({**IDS, "segment_ids": np.full((2, 3), -1, "int32")})
    with pytest.raises(ValueError, match=r"Pair also needs \['segment_ids'\]; got \['token_ids'\]"):
        model(IDS)


def test_check_inputs_takes_a_part_of_the_inputs():
    Pair(Bag(5)).check_inputs(IDS)  # decoding has no target_ids at the start


# lean


@pytest.fixture
def full_calls(monkeypatch):
    """The layers that were called in full, in order."""
    calls, full_call = [], keras.layers.Layer.__call__

    def call(self, *args, **kwargs):
        calls.append(self)
        return full_call(self, *args, **kwargs)

    monkeypatch.setattr(keras.layers.Layer, "__call__", call)
    return calls


def test_lean_skips_the_full_call(full_calls):
    layer = keras.layers.Dense(8, bias_initializer="ones")
    expected = layer(X)
    assert_close(lean(layer, ops.convert_to_tensor(X)), expected, tolerance=1e-6)
    assert full_calls == [layer]


def test_an_activity_is_penalised_in_evaluation_too():
    """Which Keras does in the full call."""
    layer = Dense(8, activity_regularizer="l2")

    class Around(keras.Model):
        def call(self, x):
            return layer(x)

    model = Around()
    model.layer = layer
    model.compile(loss=lambda y, found: 0 * found)
    expected = 0.01 * np.square(ops.convert_to_numpy(layer(X))).sum() / len(X)
    np.testing.assert_allclose(model.evaluate(X, X, batch_size=len(X), verbose=0), expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "int8"])
def test_lean_makes_the_full_call_where_it_is_needed(policy, full_calls):
    layer = keras.layers.Dense(8, dtype="float32" if policy == "int8" else policy)
    layer(X)
    if policy == "int8":
        layer.quantize("int8")
    expected, found = layer(X), lean(layer, X)
    assert full_calls == [layer] * 3
    assert found.dtype == expected.dtype
    assert_close(ops.cast(found, "float32"), ops.cast(expected, "float32"), tolerance=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dense(5, activation="gelu", bias_initializer="ones"),
        lambda: keras.layers.Dense(5, use_bias=False),
        lambda: keras.layers.LayerNormalization(epsilon=0.1, beta_initializer="ones"),
        lambda: keras.layers.LayerNormalization(center=False, scale=False),
        lambda: keras.layers.LayerNormalization(axis=(1, 2)),
        lambda: keras.layers.RMSNormalization(),
        lambda: FeedForward(8, 6),
    ],
)
def test_lean_gives_what_the_full_call_gives(make):
    layer = make()
    expected = layer(X)
    assert_close(lean(layer, ops.convert_to_tensor(X)), expected, tolerance=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends compile")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("make", [lambda: Dense(8, "gelu"), lambda: FeedForward(8, 6), LayerNormalization])
def test_torch_calls_directly(make, gradients, full_calls):
    import torch

    layer, x = make(), ops.convert_to_tensor(X)
    expected = layer(x)
    before = len(full_calls)
    with torch.set_grad_enabled(gradients):
        assert_close(layer(x), expected, tolerance=1e-6)
        x._keras_mask = ops.ones(X.shape[:2], "bool")  # which the output has to have, too
        assert layer(x)._keras_mask is x._keras_mask
        del x._keras_mask
        assert len(full_calls) == before
        layer(x.double())  # which is cast
        handle = layer.register_forward_hook(lambda layer, inputs, output: output + 1)
        assert_close(layer(x), expected + 1, tolerance=1e-6)
        handle.remove()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: output + 1)
        found = layer(x)
        handle.remove()
        assert (found - expected).abs().min() > 0.5
        layer(X)  # an array
        assert full_calls.count(layer) >= 5
    full_calls.clear()
    layer.quantize("int8") if hasattr(layer, "kernel") else setattr(layer, "dtype_policy", "mixed_bfloat16")
    layer(x)
    assert layer in full_calls


class Nested(llmfound.Layer):
    """Drops by a layer of Keras's that is not told whether to."""

    def __init__(self):
        super().__init__()
        self.drop = keras.layers.Dropout(0.999)

    def call(self, x, training=None):
        return self.drop(x)


class Holder(llmfound.Layer):
    def __init__(self, told):
        super().__init__()
        self.first, self.told = Nested(), told

    def call(self, x, training=None):
        return self.first(x, training=training if self.told is None else self.told)


@pytest.mark.parametrize("told", [None, True, False])
@pytest.mark.parametrize("training", [None, True, False])
def test_layers_that_are_not_told_whether_it_is_training_take_it_from_around(training, told, full_calls):
    layer, x = Holder(told), ops.ones((2, 50))
    layer(x)
    for _ in range(2):
        dropped = not ops.convert_to_numpy(layer(x, training=training)).all()
        assert dropped == bool(training if told is None else told)
    if keras.backend.backend() == "torch" and training is not None and told is None:
        full_calls.clear()
        layer(x, training=training)
        assert layer in full_calls and layer.first not in full_calls


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends compile")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("name", ["BERTClassifier", "BERTTokenClassifier", "Transformer", "RNNsearch", "ULMFiT"])
def test_training_by_direct_calls_is_training_by_full_ones(name, policy, monkeypatch):
    ids = np.random.default_rng(0).integers(1, 11, (4, 5)).astype("int32")
    ids[1, 3:] = 0
    pair = dict(source_ids=ids, target_ids=ids)
    make, x, y = {
        "BERTClassifier": (lambda m: m.BERTClassifier(m.BERT(11, 2, 8, 2, 16), 3), dict(token_ids=ids), ids[:, 0] % 3),
        "BERTTokenClassifier": (lambda m: m.BERTTokenClassifier(m.BERT(11, 2, 8, 2, 16), 11), dict(token_ids=ids), ids),
        "Transformer": (lambda m: m.Transformer(11, 2, 8, 2, 16, norm="pre", attention_dropout=0.1), pair, ids),
        "RNNsearch": (lambda m: m.RNNsearch(11, 11, 8, 8, 8, 4, dropout=0.1), pair, ids),
        "ULMFiT": (lambda m: m.ULMFiT(11, 8, 12), dict(token_ids=ids), ids),
    }[name]
    found = []
    keras.config.set_dtype_policy(policy)
    try:
        for direct in (True, False):
            if not direct:
                monkeypatch.setattr(llmfound.kernels, "direct_call", lambda layer, args, kwargs: False)
            keras.utils.set_random_seed(3)
            model = make(llmfound.models)
            model.compile(
                llmfound.training.Adam(0.01, global_clipnorm=1.0),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=10),  # masks hide padding
            )
            model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
            found.append([ops.convert_to_numpy(ops.cast(weight, "float32")) for weight in model.weights])
    finally:
        keras.config.set_dtype_policy("float32")
    assert len(found[0]) == len(found[1])
    for direct, full in zip(*found):
        assert_close(direct, full, tolerance=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends compile")
@pytest.mark.parametrize("brings", ["x", "memory", "both", "neither"])
@pytest.mark.parametrize("given", [(), ("mask",), ("memory_mask",), ("mask", "memory_mask")])
@pytest.mark.parametrize("make", ["MultiHeadSelfAttention", "MultiHeadAttention", "PostLNBlock", "FirstTokenPooler"])
def test_masks_come_and_go_in_direct_calls_as_in_full_ones(make, given, brings, full_calls, monkeypatch):
    """Masks that tensors bring along are heeded, those that are given come first, and the result has them."""
    layer = {
        "MultiHeadSelfAttention": lambda: llmfound.layers.MultiHeadSelfAttention(8, 2),
        "MultiHeadAttention": lambda: llmfound.layers.MultiHeadAttention(8, 2),
        "PostLNBlock": lambda: llmfound.layers.PostLNBlock(8, 2, 16, cross_attention=True),
        "FirstTokenPooler": lambda: llmfound.layers.FirstTokenPooler(8),
    }[make]()
    numbers = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype("float32")
    x, memory = (ops.convert_to_tensor(n) for n in numbers[:2])
    args = (x, memory) if make in ("MultiHeadAttention", "PostLNBlock") else (x,)
    layer(*args)
    monkeypatch.setattr(llmfound.base.within, "training", False, raising=False)  # as inside a model
    full_calls.clear()
    masks = [ops.convert_to_tensor(np.arange(5)[None] < np.array([[n], [5], [2]])) for n in (1, 2, 3, 4)]
    if brings in ("x", "both"):
        x._keras_mask = masks[0]
    if brings in ("memory", "both"):
        memory._keras_mask = masks[1]
    kwargs = {k: mask for k, mask in zip(("mask", "memory_mask"), masks[2:]) if k in given}
    kwargs = {k: mask for k, mask in kwargs.items() if k in layer.call_signature_parameters}
    direct = layer(*args, **kwargs, **({"training": False} if layer.heeds_training else {}))
    assert layer not in full_calls
    full = super(llmfound.base.Direct, layer).__call__(*args, **kwargs)
    assert_close(direct, full, tolerance=1e-6)
    assert getattr(direct, "_keras_mask", None) is getattr(full, "_keras_mask", None)


@pytest.mark.parametrize("name", ["PreLNBlock", "FeedForward", "MultiHeadSelfAttention"])
def test_wrappers_can_ask_for_the_shape_of_the_result(name):
    arguments = {"PreLNBlock": (8, 2, 16), "FeedForward": (8, 16), "MultiHeadSelfAttention": (8, 2)}[name]
    layer = getattr(llmfound.layers, name)(*arguments)
    inputs = keras.Input((4, 5, 8))  # 4 sentences of a document
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    assert model.output_shape == (None, 4, 5, 8) and layer.compute_output_shape((3, 5, 8)) == (3, 5, 8)
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 8)).astype("float32")
    for t in range(4):
        assert_close(model(x)[:, t], layer(x[:, t]), tolerance=1e-6)


class Halved(llmfound.Layer):
    def call(self, x, other=None):
        return x[:, ::2]

    def compute_output_shape(self, shape):
        return shape[0], 77, *shape[2:]


def test_a_layers_own_shape_of_the_result_is_the_one_that_counts():
    assert Halved()(keras.KerasTensor((3, 5, 8))).shape == (3, 77, 8)
    with pytest.raises(NotImplementedError, match="compute_output_shape"):
        llmfound.layers.MultiHeadAttention(8, 2).compute_output_shape(query_shape=(3, 5, 8), memory_shape=(3, 4, 8))


def test_what_is_wrong_in_a_direct_call_is_told_by_the_full_one():
    layer = Dense(3)
    layer(X)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value"):
        layer(ops.ones((2, X.shape[-1] + 1)))


def test_lean_sees_lora():
    layer = keras.layers.Dense(8)
    layer(X)
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    assert_close(lean(layer, ops.convert_to_tensor(X)), layer(X), tolerance=1e-6)


def test_a_call_is_made_once_to_build_what_is_nested(monkeypatch):
    monkeypatch.setattr(Counting, "calls", 0)
    nested = Counting(Counting(Counting(Dense(3))))
    assert nested(X).shape == (2, 4, 3) and Counting.calls == 3  # Keras alone would call them again to find weights
    assert [weight.path for weight in nested.weights] == [
        f"{nested.name}/{nested.first.name}/{nested.first.first.name}/{nested.first.first.first.name}/{part}"
        for part in ("kernel", "bias")
    ]


@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about TensorFlow's traces")
def test_a_training_step_is_traced_once(train, monkeypatch):
    """Keras alone makes the optimizer's variables inside the step, and TensorFlow then traces it a second time."""
    model = llmfound.models.BERTClassifier(llmfound.models.BERT(11, 1, 8, 2, 16), 3)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    calls = []
    call = type(model).call
    monkeypatch.setattr(
        type(model), "call", lambda self, *args, **kwargs: calls.append(1) or call(self, *args, **kwargs)
    )
    getattr(model, train)({"token_ids": np.ones((2, 4), "int32")}, np.ones(2, "int32"))
    assert len(calls) == 1


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about torch's own lists of parameters")
def test_torch_knows_every_parameter():
    model = llmfound.models.Transformer(11, 2, 8, 2, 16, norm="pre")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.count_params()
    assert len([name for name in model.state_dict() if name.startswith("_torch_params.")]) >= len(model.weights)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about torch's own lists of parameters")
def test_torch_knows_every_parameter_of_a_layer_that_keeps_sublayers_in_a_list():
    class Stack(llmfound.Layer):
        def __init__(self):
            super().__init__()
            self.blocks = [llmfound.layers.PreLNBlock(8, 2, 16) for _ in range(2)]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    stack, x = Stack(), np.ones((1, 3, 8), "float32")
    stack(x)
    assert sum(p.numel() for p in stack.parameters()) == stack.count_params() > 0
    within = keras.Sequential([keras.Input((3, 8)), Stack()])
    assert sum(p.numel() for p in within.layers[0].parameters()) == stack.count_params()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only there do gradients stay with the weights")
def test_gradients_of_the_last_step_are_freed_before_the_forward_pass():
    found = []

    class Watched(llmfound.models.BERT):
        def call(self, inputs, training=None):
            found.append([weight.value.grad is None for weight in self.trainable_weights])
            return super().call(inputs, training)["pooled"]

    model = Watched(11, 1, 8, 2, 16)
    model.compile("sgd", "mse")
    found.clear()
    for _ in range(2):
        model.train_on_batch({"token_ids": np.ones((2, 3), "int32")}, np.ones((2, 8), "float32"))
    assert len(found) >= 2 and all(found[-1])


def test_a_model_that_tells_the_shape_of_its_output_is_built_too():
    class Shaped(llmfound.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(5, 3)

        def input_signature(self):
            return {"token_ids": (None,)}

        def call(self, inputs):
            return self.embedding(inputs["token_ids"])

        def compute_output_shape(self, input_shape):
            return (*input_shape["token_ids"], 3)

    assert Shaped().count_params() == 15


def test_a_model_whose_call_is_not_traceable_says_what_is_wrong():
    class Wrong(llmfound.Model):
        def input_signature(self):
            return {"token_ids": (None,)}

        def call(self, inputs):
            raise NotImplementedError("not yet written")

    with pytest.raises(NotImplementedError, match="not yet written"):
        Wrong()


def test_a_model_of_ids_may_take_floats_beside_them():
    class Scaled(llmfound.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(5, 3)

        def input_signature(self):
            return {"token_ids": (None,)}

        def call(self, inputs, scale=None):
            x = self.embedding(inputs["token_ids"])
            return x if scale is None else x * scale

    model = Scaled()
    assert_close(model(IDS, scale=np.array([0.5], "float32")), 0.5 * ops.convert_to_numpy(model(IDS)), 1e-7)


def test_batches_with_other_padding_than_the_model_are_refused():
    """Which would else be read, and learnt, as text."""
    tokenizer = llmfound.data.Tokenizer.train(["a b c d e"] * 2, 12, kind="word")
    other = llmfound.data.Tokenizer(tokenizer.to_json(), pad="[UNK]", unk="[PAD]")
    pairs = [("a b", "c"), ("d", "e a b")]
    batches = {id_: llmfound.data.TranslationBatches(pairs, t, batch_size=2, max_length=8, shuffle=False)
               for id_, t in ((0, tokenizer), (3, other))}  # fmt: skip
    model = llmfound.models.Transformer(12, 1, 8, 2, 16)
    model.compile("sgd", llmfound.training.SmoothedCrossEntropy(0.0), metrics=[llmfound.training.Perplexity()])
    model.fit(batches[0], verbose=0)
    for use in (model.fit, model.evaluate, model.predict):
        with pytest.raises(
            ValueError, match="with token 3, and Transformer was made for pad_id=0: make it with pad_id=3"
        ):
            use(batches[3], verbose=0)
    before = int(model.optimizer.iterations)
    with pytest.raises(ValueError, match="with token 3"):
        model.fit(batches[0], validation_data=batches[3], verbose=0)
    assert int(model.optimizer.iterations) == before  # no epoch is lost
    model = llmfound.models.Transformer(12, 1, 8, 2, 16, pad_id=3)
    loss, metric = llmfound.training.SmoothedCrossEntropy, llmfound.training.Perplexity
    for what, wrong, measured in (("SmoothedCrossEntropy", 0, 3), ("Perplexity", 3, 0)):
        model.compile("sgd", loss(0.0, pad_id=wrong), metrics=[metric(pad_id=measured)])
        with pytest.raises(ValueError, match=f"fill up labels with 3, and {what} leaves out 0"):
            model.fit(batches[3], verbose=0)
    model.compile("sgd", loss(0.0, pad_id=3), metrics=[metric(pad_id=3)])
    model.fit(batches[3], verbose=0)
    keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile("sgd", keras_loss)
    with pytest.raises(ValueError, match="SparseCategoricalCrossentropy leaves out 0"):
        model.evaluate(batches[3], verbose=0)
    assert len(model.predict(batches[3], verbose=0)) == 2


def test_padding_is_checked_of_batches_for_bert():
    texts = ["a b c", "d e"]
    pieces = ["x", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]
    wordpiece = llmfound.data.WordPiece.from_vocabulary(pieces)  # pad_id is 1
    words = [text.split() for text in texts]
    sizes = dict(num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, max_length=16)
    bert = llmfound.models.BERT(len(pieces), **sizes)
    for batches in (
        llmfound.data.SentenceBatches(texts, None, wordpiece),
        llmfound.data.TaggingBatches(words, None, wordpiece, classes=["O"]),
        llmfound.data.ChoiceBatches(texts, [texts] * 2, None, wordpiece),
    ):
        with pytest.raises(ValueError, match="with token 1, and BERT was made for pad_id=0"):
            bert.predict(batches, verbose=0)
    tagger = llmfound.models.BERTTokenClassifier(llmfound.models.BERT(len(pieces), pad_id=1, **sizes), 2)
    tags = llmfound.data.TaggingBatches(words, [["O", "B", "O"], ["O", "B"]], wordpiece)
    loss, accuracy = llmfound.training.SmoothedCrossEntropy, llmfound.training.TokenAccuracy
    tagger.compile("sgd", loss(0.0, pad_id=-1), metrics=[accuracy()])  # which would leave out O, class 0
    with pytest.raises(ValueError, match="TaggingBatches fill up labels with -1, and TokenAccuracy leaves out 0"):
        tagger.fit(tags, verbose=0)
    tagger.compile("sgd", loss(0.0, pad_id=-1), metrics=[accuracy(pad_id=-1)])
    tagger.fit(tags, verbose=0)
    model = llmfound.models.BERTPretraining(llmfound.models.BERT(len(pieces), pad_id=1, **sizes), next_sentence=False)
    model.compile("sgd", {"masked_lm": loss(0.0, pad_id=1)})
    hidden = llmfound.data.PretrainingBatches([texts], wordpiece, max_length=8, next_sentence=False)
    with pytest.raises(ValueError, match="PretrainingBatches fill up labels with 0, and SmoothedCrossEntropy"):
        model.fit(hidden, verbose=0)


def test_class_weight_of_rows_with_several_labels_is_refused():
    """Of which Keras would take the place of the greatest one for the class."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]
    wordpiece = llmfound.data.WordPiece.from_vocabulary(pieces)
    bert = llmfound.models.BERT(len(pieces), num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, max_length=16)
    tagger, loss = llmfound.models.BERTTokenClassifier(bert, 2), llmfound.training.SmoothedCrossEntropy
    tagger.compile("sgd", loss(0.0, pad_id=-1))
    tags = llmfound.data.TaggingBatches([["a", "b"], ["c"]], [["O", "B"], ["O"]], wordpiece)
    x, y = tags[0]
    weights = {0: 0.1, 1: 1.0}
    for use, given in ((tagger.fit, (tags,)), (tagger.fit, (x, y)), (tagger.train_on_batch, (x, y))):
        with pytest.raises(ValueError, match=r"one class each, and the labels are of shape \(2, 16\)"):
            use(*given, class_weight=weights)
    model = llmfound.models.BERTPretraining(bert)
    model.compile("sgd", {"masked_lm": loss(0.0), "next_sentence": loss(0.0, pad_id=None)})
    hidden = llmfound.data.PretrainingBatches([["a b c", "d e"], ["e d", "a"]], wordpiece, max_length=8)
    with pytest.raises(ValueError, match="the labels are masked_lm, next_sentence"):
        model.fit(hidden, class_weight=weights)
    classifier = llmfound.models.BERTClassifier(bert, 2)
    classifier.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    classifier.fit(llmfound.data.SentenceBatches(["a", "b c"], [0, 1], wordpiece), class_weight=weights, verbose=0)
    classifier.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    classifier.fit(x, np.eye(2, dtype="int32"), class_weight=weights, verbose=0)


def test_predictions_that_cannot_be_joined_end_at_once():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]
    wordpiece = llmfound.data.WordPiece.from_vocabulary(pieces)
    bert = llmfound.models.BERT(len(pieces), num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, max_length=16)
    texts = ["a", "b c d e a", "b c"]
    options = dict(labels=None, tokenizer=wordpiece, batch_size=1, max_length=16)
    batches = llmfound.data.SentenceBatches(texts, length_multiple=4, **options)
    expected = [batches[i] for i in range(3)]

    class Count(keras.callbacks.Callback):
        seen = 0

        def on_predict_batch_begin(self, batch, logs=None):
            self.seen += 1

    count = Count()
    if keras.backend.backend() == "tensorflow":
        assert tuple(bert.predict(batches, verbose=0)["sequence"].shape) == (3, None, 8)
    else:
        with pytest.raises(ValueError, match=r"batch 1 a row is of shape \(8, 8\), before it of \(4, 8\)"):
            bert.predict(batches, verbose=0, callbacks=count)
        assert count.seen == 2
    batches = llmfound.data.SentenceBatches(texts, length_multiple=16, **options)
    found = bert.predict(batches, verbose=0, callbacks=count)
    assert found["sequence"].shape == (3, 16, 8) and count.seen
    for i, x in enumerate(expected):
        assert_close(found["pooled"][i : i + 1], bert.predict_on_batch(x)["pooled"], 1e-5)
    score = llmfound.models.BERTClassifier(bert, 1)  # whose outputs of one row Keras hands to callbacks as floats
    batches = llmfound.data.SentenceBatches(texts, length_multiple=4, **options | dict(batch_size=2))
    assert score.predict(batches, verbose=0).shape == (3, 1)


def test_predictions_of_rows_in_a_changing_order_are_refused():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]
    wordpiece = llmfound.data.WordPiece.from_vocabulary(pieces)
    bert = llmfound.models.BERT(len(pieces), num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, max_length=16)
    hidden = llmfound.data.PretrainingBatches([["a b c", "d e"], ["e d", "a"]], wordpiece, max_length=8)
    with pytest.raises(ValueError, match="that nobody knows; call predict_on_batch with each"):
        llmfound.models.BERTPretraining(bert).predict(hidden)
    texts = llmfound.data.SentenceBatches(["a", "b"], [0, 1], wordpiece)
    with pytest.raises(ValueError, match="that nobody knows; make them with shuffle=False"):
        llmfound.models.BERTClassifier(bert, 2).predict(texts)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="about torch's own lists of parameters")
def test_torch_knows_the_parameters_of_lora():
    import torch

    model, other = (llmfound.models.Transformer(11, 1, 8, 2, 16) for _ in range(2))
    around, before = torch.nn.Sequential(model), len(other.state_dict())
    for dense in (model.encoder_blocks[0].attention.query, model.decoder_blocks[0].feedforward.expand):
        dense.enable_lora(2)
    optimizer = torch.optim.SGD(around.parameters(), 0.1)
    listed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(id(variable.value) in listed for variable in model.weights)
    assert len([name for name in model.state_dict() if "lora" in name]) == 4
    assert len(other.state_dict()) == before
