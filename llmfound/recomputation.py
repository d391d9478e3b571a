"""keras.RematScope for layers as they are: activations that are computed again on the way back, not kept."""

import contextlib
import copy
import threading

import keras
from keras.src.backend import AutocastScope, get_keras_mask, set_keras_mask
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

within = threading.local()  # the full call that is going on; its `training` holds for all that is called in it


class Recomputed:
    """A layer that can be computed again, exactly, wherever keras.RematScope wants it to be.

        with keras.RematScope("list_of_layers", layer_names=["block_0", "block_1"]):
            model = llmfound.models.BERT(...)

    Keras 3.15.1 repeats a call without what holds around it, `training` of layers inside and the dtype of mixed
    precision, and draws other numbers than before. Moreover JAX and TensorFlow take functions of tensors alone, and it
    hands them the other arguments, too, and the variables, whose new values, as those of a dropout's generator, must
    not come from a repetition. So here what is repeated is a function of values, and its new states are put into the
    variables outside.

    What is within a repeated layer is not repeated by itself again. Where all layers are to be, by the mode "full" or
    by their size, those that are `repeated_in_parts` leave it to their parts: to repeat a whole model saves nothing.
    """

    repeated_in_parts = False

    def rematerialized_call(self, call, *args, **kwargs):
        if (
            getattr(within, "repeated", False)
            or in_symbolic_scope()
            or (self.repeated_in_parts and self._remat_mode.mode != "list_of_layers")
            or not all(layer.built for layer in self._flatten_layers())
            or super().rematerialized_call(call, *args, **kwargs) is call  # which the mode leaves as it is
        ):
            return call
        around = _surroundings()
        if keras.backend.backend() == "torch":  # which repeats a call as it is
            call = _as_at_first(call, self, around)
            return super().rematerialized_call(call, *args, **kwargs)
        scope = get_global_attribute("stateless_scope")
        outside = scope.state_mapping if scope else {}
        generator = get_global_attribute("global_seed_generator")
        variables = [*self.variables, *_states(self), *([generator.state] if generator else [])]
        tensors, rebuild = _taken_apart((args, kwargs))
        with AutocastScope(None):
            given = [*(v.value if _is_float(v) else keras.ops.copy(v) for v in variables), *tensors]
        smooth_in, told = [_is_float(x) for x in given], []

        def function(*values):
            values = _merged(smooth_in, values, (x for x in given if not _is_float(x)))
            inner = StatelessScope(zip(variables, values), collect_losses=True, initialize_variables=False)
            before = {**outside, **inner.state_mapping}
            inner.state_mapping = dict(before)
            with inner, _restored(around):
                args, kwargs = rebuild(values[len(variables) :])
                outputs, put_together = _taken_apart(call(*args, **kwargs))
            changed = [v for v in variables if inner.state_mapping[id(v)] is not before[id(v)]]
            results = [*outputs, *inner.losses]
            smooth = [_is_float(x) for x in results]
            rest = [x for x in results if not _is_float(x)], [inner.state_mapping[id(v)] for v in changed]
            if not told:  # by the first pass, not by its repetition
                told.extend((put_together, len(outputs), smooth, changed, rest))
            results = [x for x in results if _is_float(x)]
            return (results, rest) if keras.backend.backend() == "jax" else (results,)

        recomputed = super().rematerialized_call(function, *args, **kwargs)

        def run(*args, **kwargs):
            results, *rest = recomputed(*(x for x in given if _is_float(x)))
            put_together, count, smooth, changed, found = told
            others, states = rest[0] if rest else found
            for variable, state in zip(changed, states):
                variable.assign(state)
            results = _merged(smooth, results, others)
            for loss in results[count:]:
                self.add_loss(loss)
            return put_together(results[:count])

        return run


@contextlib.contextmanager
def nothing_recomputed(layer):
    """What is called in a layer gives numbers meanwhile: JAX traces what it may have to repeat."""
    modes = [(part, part._remat_mode) for part in layer._flatten_layers()]
    try:
        for part, _ in modes:
            part._remat_mode = None
        yield
    finally:
        for part, mode in modes:
            part._remat_mode = mode


def _states(layer):
    """The variables in which recurrent layers carry their states on: Keras does not list them with the others."""
    parts = [part for part in layer._flatten_layers() if isinstance(part, keras.layers.RNN) and part.stateful]
    return keras.tree.flatten([part.states for part in parts])


def _as_at_first(call, layer, around):
    """A call that finds what it found the first time whenever it is repeated, and leaves no trace then."""
    first, variables = [], [*layer.non_trainable_variables, *_states(layer)]

    def repeated(*args, **kwargs):
        now, repetition = [keras.ops.copy(v.value) for v in variables], bool(first)
        first[:] = first or now
        for variable, value in zip(variables, first):
            variable.assign(value)
        filtering = keras.config.is_traceback_filtering_enabled()
        try:
            # PyTorch breaks off, by an exception, a repetition that has given all it must. Keras would wrap it at each
            # layer, and what was computed would live on in its traceback.
            set_global_attribute("traceback_filtering", filtering and not repetition)
            with _restored(around):
                return call(*args, **kwargs)
        finally:
            set_global_attribute("traceback_filtering", filtering)
            for variable, value in zip(variables, now if repetition else ()):
                variable.assign(value)
            for part in layer._flatten_layers() if repetition else ():  # which was broken off before its end
                if isinstance(part, keras.layers.RNN):
                    part._maybe_reset_dropout_masks(part.cell)

    return repeated


def _is_float(x):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))


def _merged(own, values, others):
    """One list of two, in the order of `own`, which tells whose turn it is."""
    values, others = iter(values), iter(others)
    return [next(values if is_own else others) for is_own in own]


def _taken_apart(structure):
    """The tensors of a structure and the masks that they bring, and a function that puts others in their places."""
    leaves = keras.tree.flatten(structure)
    places = [place for place, leaf in enumerate(leaves) if keras.ops.is_tensor(leaf)]
    masks = {place: get_keras_mask(leaves[place]) for place in places}
    masks = {place: mask for place, mask in masks.items() if mask is not None}

    def put_together(values):
        new = {**dict(enumerate(leaves)), **dict(zip(places, values))}
        for place, mask in zip(masks, values[len(places) :]):
            set_keras_mask(new[place], mask)
        return keras.tree.pack_sequence_as(structure, list(new.values()))

    return [leaves[place] for place in places] + list(masks.values()), put_together


def _surroundings():
    """What holds around a call, beyond its arguments: `training` for the layers inside, and the dtype of weights."""
    context = copy.copy(get_global_attribute("current_call_ctx"))
    return context, get_global_attribute("autocast_scope"), getattr(within, "training", "unknown")


@contextlib.contextmanager
def _restored(around):
    now = _surroundings()
    try:
        _surround(*around, repeated=True)
        yield
    finally:
        _surround(*now, repeated=False)


def _surround(context, autocast, training, repeated):
    set_global_attribute("current_call_ctx", copy.copy(context))
    set_global_attribute("autocast_scope", autocast)
    within.training, within.repeated = training, repeated
