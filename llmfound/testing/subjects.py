"""What is under test: a layer or model with fixed weights, its call arguments and what it returns for them."""

import functools
import inspect
import math

import keras
import numpy as np
from keras import ops, tree

from llmfound.testing.numbers import fixture

EXTRA = 3  # padded positions appended by the checks


class Subject:
    """A layer or model with fixed weights, its call arguments and what it returns for them."""

    mask = None  # name of the argument that tells padding

    def __init__(self, make, layer, arguments, prepare=None):
        self.make, self.layer = make, layer
        self.arguments = {name: _sorted(tree.map_structure(as_32_bits, x)) for name, x in arguments.items()}
        leaves = [x for value in self.arguments.values() for x in tree.flatten(value)]  # in the order of the dict
        arrays = [x for x in leaves if isinstance(x, np.ndarray) and x.ndim]
        if not arrays:
            raise ValueError(f"The inputs must hold NumPy arrays; got {arguments}.")
        self.batch_size = len(arrays[0])
        self.run(layer)
        (prepare or fill)(layer)
        self.weights = layer.get_weights()
        self.outputs = self.run(layer)

    def run(self, layer, arguments=None):
        reset_states(layer)
        return layer(**(arguments or self.arguments), training=False)

    def twin(self, layer=None):
        """Another layer, by default a new one, built by a call and given the weights under test."""
        layer = layer or self.make()
        if layer is self.layer:
            raise ValueError("make must return a new object at each call; it returned the same one twice.")
        if len(layer.get_weights()) != len(self.weights):
            self.run(layer)
        shapes, expected = ([w.shape for w in weights] for weights in (layer.get_weights(), self.weights))
        if shapes != expected:
            raise AssertionError(f"the weights have shapes {shapes}; expected {expected}.")
        layer.set_weights(self.weights)
        return layer

    @property
    def can_train(self):
        """Whether there is something to train, and a loss to train it on."""
        return bool(self.layer.trainable_weights)

    def is_batched(self, x):
        return isinstance(x, np.ndarray) and x.ndim > 0 and len(x) == self.batch_size

    def arrays(self, arguments=None):
        return [x for x in tree.flatten(arguments or self.arguments) if self.is_batched(x)]

    def symbolic(self, make, batch_size=None, is_open=lambda x: False):
        """The arguments with make(shape, dtype) for each array, its length None if is_open(array)."""

        def symbol(x):
            if not self.is_batched(x):
                return x
            return make((batch_size, None, *x.shape[2:]) if is_open(x) else (batch_size, *x.shape[1:]), x.dtype.name)

        return tree.map_structure(symbol, self.arguments)

    def graph(self, layer, is_open=lambda x: False):
        """A functional model of the layer alone; it takes what `arrays` gives."""
        arguments = self.symbolic(lambda shape, dtype: keras.Input(batch_shape=shape, dtype=dtype), is_open=is_open)
        return keras.Model([x for x in tree.flatten(arguments) if isinstance(x, keras.KerasTensor)], layer(**arguments))

    @functools.cached_property
    def second(self):
        """A twin for graphs and for training, which leave it as it was: to make a model takes seconds."""
        return self.twin()

    @functools.cached_property
    def functional(self):
        return self.graph(self.second)

    @functools.cached_property
    def padded(self):
        """(what, arguments, real positions, outputs) for each of `paddings`."""
        return [(*padding, self.run(self.layer, padding[1])) for padding in self.paddings()]

    @functools.cached_property
    def under_bfloat16(self):
        """Outputs of a twin made under the global policy mixed_bfloat16."""
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            return self.run(self.twin())
        finally:
            keras.config.set_dtype_policy(policy)

    @functools.cached_property
    def trainer(self):
        """The second layer in a compiled model, whose optimizer keeps the gradients."""
        return compiled(self.trainable(self.second, shift_inputs=True), Recorder(0.1, name="recorder"), self.loss)

    def fit(self, arguments=None, steps=1):
        """Steps on one batch, from the weights under test: the losses, and {path: gradient} of the last one.

        Of all weights, and of a layer's float inputs.
        """
        model, losses = self.trainer, []
        for _ in range(steps):
            reset_random(model)
            model.optimizer.forget()
            batch = self.batch(arguments)
            history = model.fit(**batch, batch_size=self.batch_size, epochs=1, shuffle=False, verbose=0).history
            losses += history["loss"]
        self.second.set_weights(self.weights)
        for shift in getattr(model, "shifts", {}).values():
            shift.assign(np.zeros(shift.shape))
        paths = [weight.path for weight in model.trainable_weights]
        return losses, dict(zip(paths, [ops.convert_to_numpy(g.value) for g in model.optimizer.gradients]))


class LayerSubject(Subject):
    """A layer; its padding is what the argument named `mask` says."""

    def __init__(self, make, layer, arguments, mask=None, prepare=None):
        if isinstance(arguments, tuple):
            arguments = dict(zip(inspect.signature(layer.call).parameters, arguments))
        if not isinstance(arguments, dict):
            raise ValueError(f"inputs must be a dict of call arguments, or a tuple of them; got {type(arguments)}.")
        if mask is not None and (np.ndim(arguments.get(mask)) != 2 or arguments[mask].dtype != bool):
            raise ValueError(f"mask must name a bool (batch, length) array among {list(arguments)}; got {mask!r}.")
        super().__init__(make, layer, arguments, prepare)
        self.mask, self.loss = mask, None

    def savable(self):
        """A keras.Model with the weights under test, and the inputs it takes."""
        return self.functional, self.arrays()

    @property
    def can_train(self):
        return any(keras.backend.is_float_dtype(y.dtype) for y in tree.flatten(self.outputs)) and (
            super().can_train or any(map(is_float, self.arrays()))
        )

    def trainable(self, layer, shift_inputs=False):
        """A keras.Model of the layer that has a loss; with `shift_inputs`, what it adds to float inputs learns, too."""
        return _Probe(layer, self, shift_inputs)

    def batch(self, arguments=None):
        """What the trainer trains on."""
        return {"x": self.arrays(arguments)}

    def mask_carried(self):
        """The mask of Keras that the first output has where the first input has one, of the same length; else None."""
        first, x = next(iter(self.arguments.items()))
        if self.mask != "mask" or not self.is_padded(x):
            return None
        x = ops.convert_to_tensor(x)
        keras.src.backend.set_keras_mask(x, ops.convert_to_tensor(self.arguments["mask"]))
        rest = {name: value for name, value in self.arguments.items() if name not in (first, "mask")}
        outputs = tree.flatten(self.run(self.layer, {first: x, **rest}))
        mask = mask_of(outputs[0])
        return None if mask is None or mask.shape != self.arguments["mask"].shape else ops.convert_to_numpy(mask)

    def is_padded(self, x):
        """Whether an array has the length axis of the mask."""
        if self.mask is None or not self.is_batched(x) or x.ndim < 2:
            return False
        return x.shape[1] == self.arguments[self.mask].shape[1]

    def paddings(self):
        """(what, arguments with more padding, real positions) for each length that can be padded."""
        if self.mask is None:
            return
        real = self.arguments[self.mask]

        def pad(x):
            if not self.is_padded(x):
                return x
            if x.dtype == bool:
                return np.pad(x, ((0, 0), (0, EXTRA), *((0, 0),) * (x.ndim - 2)))
            other = np.flip(x, (0, 1))  # values that the layer accepts, in other places
            if np.issubdtype(x.dtype, np.floating):
                other = 1 - 3 * other
            inside = np.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, other)
            return np.concatenate([inside, np.take(other, np.arange(EXTRA) % x.shape[1], axis=1)], axis=1)

        yield f"what {self.mask} hides", tree.map_structure(pad, self.arguments), real

    def all_padding(self):
        """(what, arguments whose first row is padding alone) for each length that can be padded."""
        if self.mask is not None:
            mask = self.arguments[self.mask].copy()
            mask[0] = False
            yield self.mask, {**self.arguments, self.mask: mask}


class ModelSubject(Subject):
    """A model; its padding is the token `pad_id` in integer inputs of rank 2."""

    def __init__(self, make, model, batch, loss=None, pad_id=0, prepare=None):
        if not isinstance(batch, tuple) or len(batch) not in (2, 3):
            raise ValueError(f"batch must be (inputs, labels) or (inputs, labels, sample_weight); got {type(batch)}.")
        inputs, *labels = batch
        loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.argument = next(iter(inspect.signature(model.call).parameters))
        super().__init__(make, model, {self.argument: inputs}, prepare)
        self.labels, self.loss, self.pad_id = dict(zip(("y", "sample_weight"), labels)), loss, pad_id

    def savable(self):
        return self.layer, self.arguments[self.argument]

    def trainable(self, model, shift_inputs=False):
        return model

    def batch(self, arguments=None):
        return {"x": (arguments or self.arguments)[self.argument], **self.labels}

    def is_padded(self, x):
        return self.pad_id is not None and self.is_batched(x) and x.ndim == 2 and np.issubdtype(x.dtype, np.integer)

    def lengths(self):
        """{length: real positions} of the inputs that can be padded."""
        found = {}
        for x in filter(self.is_padded, tree.flatten(self.arguments)):
            found[x.shape[1]] = found.get(x.shape[1], False) | (x != self.pad_id)
        return found

    def replaced(self, length, replace):
        """The arguments with replace(ids) for those of one length."""

        def at_length(x):
            return replace(x) if self.is_padded(x) and x.shape[1] == length else x

        return tree.map_structure(at_length, self.arguments)

    def paddings(self):
        def pad(ids):
            return np.pad(ids, ((0, 0), (0, EXTRA)), constant_values=self.pad_id)

        for length, real in self.lengths().items():
            yield f"the inputs of length {length}", self.replaced(length, pad), real

    def all_padding(self):
        def blank(ids):
            return np.concatenate([np.full_like(ids[:1], self.pad_id), ids[1:]])

        for length in self.lengths():
            yield f"the inputs of length {length}", self.replaced(length, blank)


def _sorted(nest):
    """A dict of inputs in the order of its keys, in which some backends flatten it and others do not."""
    return {key: _sorted(nest[key]) for key in sorted(nest)} if isinstance(nest, dict) else nest


class _Probe(keras.Model):
    """Trains a layer alone, on a fixed projection of all that it returns.

    A plain sum would not do: that of a softmax or of a layer norm is constant and leaves no gradient. Zeros that learn
    can be added to the inputs, so that their gradient is that of the inputs.
    """

    def __init__(self, layer, subject, shift_inputs=False):
        super().__init__(name="probe")
        self.layer = layer
        self.is_batched, self.arguments = subject.is_batched, subject.arguments
        self.shifts = {}
        found = tree.flatten_with_path(self.arguments) if shift_inputs else []
        for index, (path, x) in enumerate((path, x) for path, x in found if self.is_batched(x)):
            if is_float(x):
                name = "_".join(["input", *map(str, path)])  # some backends take no dots, others no spaces
                self.shifts[str(index)] = self.add_weight(shape=x.shape, initializer="zeros", name=name)

    def call(self, arrays, training=None):
        arrays = tree.flatten(arrays)
        arrays = iter([x + self.shifts[str(i)] if str(i) in self.shifts else x for i, x in enumerate(arrays)])
        arguments = tree.map_structure(lambda x: next(arrays) if self.is_batched(x) else x, self.arguments)
        return self.layer(**arguments, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        outputs = [y for y in tree.flatten(y_pred) if keras.backend.is_float_dtype(y.dtype)]
        factors = [fixture(f"output {i}", (1, *y.shape[1:])) for i, y in enumerate(outputs)]
        # PyTorch refuses a loss that no weight reaches
        reached = sum(0.0 * ops.sum(ops.cast(weight, "float32")) for weight in self.trainable_weights)
        return reached + sum(
            ops.mean(ops.multiply(ops.cast(y, "float32"), f.astype("float32"))) for y, f in zip(outputs, factors)
        )


def compiled(model, optimizer, loss):
    """The model, compiled; the optimizer's variables are made before a step, inside which TensorFlow takes long."""
    model.compile(optimizer, loss)
    if all(layer.built for layer in model._flatten_layers(include_self=False)):
        optimizer.build(model.trainable_variables)
    return model


class _MaskReader(keras.layers.Layer):
    """Reads the mask that Keras attached to a tensor, wherever the backend keeps it."""

    supports_masking = True

    def __init__(self):
        super().__init__(autocast=False)
        self.read = []

    def call(self, x, mask=None):
        self.read[:] = [mask]
        return x


def mask_of(x):
    """The Keras mask of a tensor, or None."""
    reader = _MaskReader()
    reader(x)
    return reader.read[0]


class KeepsGradients:
    """For an optimizer: keeps the sum of the gradients, the one way to them that every backend has."""

    def build(self, variables):
        super().build(variables)
        self.gradients = self.add_optimizer_variables(variables, "gradient")

    def forget(self):
        for gradient in self.gradients if self.built else ():
            gradient.assign(np.zeros(gradient.shape))

    def apply(self, grads, trainable_variables=None):
        """Takes None, where no path leads to a weight, for zero: as JAX does; TensorFlow fails if all are None."""
        weights = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        super().apply([ops.zeros(v.shape, v.dtype) if g is None else g for g, v in zip(grads, weights)], weights)

    def update_step(self, gradient, variable, learning_rate):
        self.assign_add(self.gradients[self._get_variable_index(variable)], gradient)
        super().update_step(gradient, variable, learning_rate)


class Recorder(KeepsGradients, keras.optimizers.SGD):
    """SGD that keeps the gradients."""


def is_float(x):
    return np.issubdtype(x.dtype, np.floating)


def as_32_bits(x):
    if not isinstance(x, np.ndarray):
        return x
    return x.astype({"float64": "float32", "int64": "int32"}.get(x.dtype.name, x.dtype))


def fill(layer):
    """Sets the trainable weights to fixed numbers, none of them zero.

    Matrices get unit gain; vectors stay near their start, so that scales stay near 1.
    """
    for index, weight in enumerate(layer.trainable_weights):
        noise = fixture(f"weight {index}", tuple(weight.shape))
        if noise.ndim >= 2:
            weight.assign(noise * math.sqrt(12 / math.prod(noise.shape[:-1])))
        else:
            weight.assign(ops.convert_to_numpy(weight) + 0.2 * noise)
    reset_random(layer)


def reset_states(layer):
    """Sets what stateful recurrent layers remember to zero."""
    for part in layer._flatten_layers():
        if getattr(part, "stateful", False) is True and hasattr(part, "reset_state"):
            part.reset_state()


def reset_random(layer):
    """Sets random generators to a fixed state, so that dropout drops the same again."""
    for variable in layer.non_trainable_variables:
        if variable.name == "seed_generator_state":
            variable.assign(np.array([1337, 0]))
