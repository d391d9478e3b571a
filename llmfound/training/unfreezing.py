"""Which layers train when, and how fast. Source: Howard and Ruder 2018, sections 3.2 and 3.3."""

import keras


class GradualUnfreezing(keras.callbacks.Callback):
    """Trains the top group of layers alone at first, and adds the next lower one after each epoch.

    The optimizer is one of the discriminative family, whose groups these are. Nothing is compiled anew and the
    optimizer keeps its state. A group that waits keeps its weights bit for bit; on PyTorch its gradients are not
    computed, while the compiled steps of JAX and TensorFlow compute them still. At each stage a line tells the rates:

        epoch 2: training lstm_3 at 3.85e-03 and head at 1.00e-02; waiting: embedding, lstm_1, lstm_2

    The rates shown are the greatest that the optimizer's schedule has, if it tells its peak, and those of the first
    step else. All groups train after the last epoch, so that nothing stays frozen. A `fit` that is interrupted leaves
    them as they are, and so does a file that was saved within it: call
    `optimizer.train(range(len(optimizer.ratios)))` before a `fit` without this callback. A model of this library may
    also be compiled with a new optimizer.
    Source: Howard and Ruder 2018, section 3.3.

    Args:
        epochs_per_group: int, epochs from one unfreezing to the next; 1 in the paper.
        verbose: whether the line is printed.

    Raises:
        ValueError: if `epochs_per_group` is not positive; in `fit`, if the optimizer has no groups.
    """

    def __init__(self, epochs_per_group=1, verbose=True):
        super().__init__()
        if epochs_per_group < 1:
            raise ValueError(f"epochs_per_group must be at least 1; got {epochs_per_group}.")
        self.epochs_per_group = epochs_per_group
        self.verbose = verbose

    def on_train_begin(self, logs=None):
        self.trained = None
        optimizer_with(self.model, "train", "GradualUnfreezing")
        if not self.model.optimizer.built:  # before the first step, which is to know what waits
            self.model.optimizer.build(self.model.trainable_variables)

    def on_epoch_begin(self, epoch, logs=None):
        optimizer = optimizer_with(self.model, "train", "GradualUnfreezing")
        count = len(optimizer.ratios)
        trained = min(1 + epoch // self.epochs_per_group, count)
        if trained != self.trained:
            self.trained = trained
            optimizer.train(range(count - trained, count))
            if self.verbose:
                print(f"epoch {epoch + 1}: {rates(optimizer)}", flush=True)

    def on_train_end(self, logs=None):
        optimizer = optimizer_with(self.model, "train", "GradualUnfreezing")
        optimizer.train(range(len(optimizer.ratios)))


_NEEDED = {
    "train": "an optimizer with groups of layers, such as DiscriminativeAdam",
    "scale": "ASGD, or an optimizer with groups of layers, such as DiscriminativeAdam",
    "start_averaging": "ASGD",
}


def optimizer_with(model, attribute, user):
    """The optimizer of a compiled model, without the wrapper of mixed_float16; it must have what `user` needs of it."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not hasattr(optimizer, attribute):
        raise ValueError(f"{user} needs {_NEEDED[attribute]}; got {type(optimizer).__name__}.")
    return optimizer


def rates(optimizer):
    """One line on which groups of a discriminative optimizer train, and how fast; see `GradualUnfreezing`."""
    now = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    peak = getattr(optimizer._learning_rate, "peak", now)
    ratios = keras.ops.convert_to_numpy(optimizer.group_ratios)
    groups = [(optimizer.group_names[i], ratios[i]) for i in optimizer.filled_groups]
    trained = [f"{name} at {peak * r:.2e}" for name, r in groups if r > 0]
    waiting = [name for name, r in groups if r == 0]
    line = "training " + " and ".join(filter(None, [", ".join(trained[:-1]), trained[-1] if trained else "nothing"]))
    return line + (f"; waiting: {', '.join(waiting)}" if waiting else "")


class WindowRates(keras.callbacks.Callback):
    """Scales the learning rate of each step with the length of its window of text, length / window.

    For windows of varying length, from which a short one would else learn as much as a long one. A `fit` that is
    interrupted leaves the scale of its window: call `optimizer.scale.assign(1.0)` before one without this callback.
    Source: Merity, Keskar, Socher 2018, section 4.1; the authors' code.

    Args:
        batches: LanguageModelBatches of the same `fit`, with shuffle=False.

    Raises:
        ValueError: in `fit`, if the optimizer is neither ASGD nor one with groups of layers, or steps_per_execution is
            not 1.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_begin(self, logs=None):
        optimizer_with(self.model, "scale", "WindowRates")
        if self.model.steps_per_execution != 1:
            raise ValueError(
                f"WindowRates needs steps_per_execution=1; got {self.model.steps_per_execution}, of which each step "
                "would have the rate of the first."
            )
        self.lengths, self.done = (), 0

    def on_epoch_begin(self, epoch, logs=None):
        if self.done == len(self.lengths):  # with steps_per_epoch, a pass over the text is several epochs
            self.lengths, self.done = self.batches.lengths, 0

    def on_train_batch_begin(self, batch, logs=None):
        optimizer = optimizer_with(self.model, "scale", "WindowRates")
        optimizer.scale.assign(self.lengths[self.done] / self.batches.window)
        self.done += 1

    def on_train_end(self, logs=None):
        optimizer_with(self.model, "scale", "WindowRates").scale.assign(1.0)
