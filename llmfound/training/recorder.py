"""How large the gradients and the outputs of the layers are while a model trains."""

import keras
import numpy as np
from keras import ops

from llmfound import kernels
from llmfound.recomputation import nothing_recomputed


class NormRecorder(keras.callbacks.Callback):
    """Records, layer by layer, the norm of the loss's gradient and of the outputs, every so many steps of `fit`.

    Both are of one batch that is given, which the model sees as in `evaluate`, without dropout; so that two records
    differ by what the model learned between them alone. The steps of training themselves, compiled or not, are not
    touched. A record costs about one step. Source: Xiong et al. 2020, figure 3, and Glorot and Bengio 2010, section 4.

    Args:
        x, y, sample_weight: the batch, as for `train_on_batch`.
        every: int, steps from one record to the next; the first is made before training, the last at its end. With
            `steps_per_execution`, a record waits for the end of the execution.
        layers: list of layers, or of their names, anywhere in the model, or one of them; None takes all that
            `layer_groups()` names, or else the model's own layers that have weights.

    Attributes:
        names: list of str, of the layers.
        steps: list of int, after which the records were made.
        gradients: float (records, layers), ||dL/dW|| over all trainable weights of a layer.
        activations: float (records, layers), the mean length of the output's vectors; NaN where a layer has no output.

    Raises:
        ValueError: if `every` is not positive; in `fit`, if the model has no such layer.
    """

    def __init__(self, x, y=None, sample_weight=None, every=100, layers=None):
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1; got {every}.")
        self.batch = x, y, sample_weight
        self.every = every
        self.layers = [layers] if isinstance(layers, str | keras.layers.Layer) else layers
        self.names, self.steps = [], []
        self.gradients = self.activations = np.zeros((0, 0))

    def on_train_begin(self, logs=None):
        self._chosen = _find(self.model, self.layers)
        self.names, self.steps, self._step = [_short(layer, self.model) for layer in self._chosen], [], 0
        self.gradients = self.activations = np.zeros((0, len(self.names)))
        self.record()

    def on_epoch_begin(self, epoch, logs=None):
        self._done_before = self._step

    def on_train_batch_end(self, batch, logs=None):
        before, self._step = self._step, self._done_before + min(batch + 1, self.params["steps"] or batch + 1)
        if self._step // self.every > before // self.every:
            self.record()

    def on_train_end(self, logs=None):
        if self.steps[-1] != self._step:
            self.record()

    def record(self):
        """Adds a record of the model as it is."""
        model = self.model  # on JAX, this brings its weights up to date
        state = [*model.non_trainable_variables, *model.metrics_variables]
        before = [ops.copy(variable.value) for variable in state]
        try:
            lengths = _lengths(model, self._chosen, self.batch[0])
            of_weights = dict(zip(map(id, model.trainable_weights), kernels.loss_gradients(model, *self.batch)))
        finally:
            for variable, value in zip(state, before):
                variable.assign(value)
        norms = [
            np.sqrt(sum(np.square(of_weights[id(w)], dtype="float64").sum() for w in layer.trainable_weights))
            for layer in self._chosen
        ]
        self.steps.append(self._step)
        self.gradients = np.concatenate([self.gradients, [norms]])
        self.activations = np.concatenate([self.activations, [lengths]])


def _find(model, wanted):
    every = list(model._flatten_layers(include_self=False))
    if wanted is None:
        groups = getattr(model, "layer_groups", None)
        found = [layer for group in groups() for layer in group] if groups else model.layers
        found = [layer for layer in found if layer.weights]
    else:
        found = []
        for one in wanted:
            same = [layer for layer in every if layer is one or one in (layer.name, _short(layer, model))]
            if not same:
                raise ValueError(f"{model.name} has no layer {getattr(one, 'path', one)!r}.")
            found += same
    if not found:
        raise ValueError(f"{model.name} has no layers with weights; name some.")
    return found


def _short(layer, model):
    return (layer.path or layer.name).removeprefix(f"{model.name}/")


def _lengths(model, layers, x):
    """The mean length of the vectors that leave each layer: list of float, NaN for one that is not called."""
    found = {}

    def listening(layer, call):
        def listen(*args, **kwargs):
            outputs = call(*args, **kwargs)
            first = keras.tree.flatten(outputs)[0]
            squares = ops.sum(ops.square(ops.cast(first, "float32")), axis=-1)
            found[id(layer)] = float(ops.convert_to_numpy(ops.mean(ops.sqrt(squares))))
            return outputs

        return listen

    for layer in layers:
        object.__setattr__(layer, "call", listening(layer, layer.call))  # past Keras's tracking of attributes
    try:
        with nothing_recomputed(model):
            model(x, training=False)
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")
    return [found.get(id(layer), np.nan) for layer in layers]
