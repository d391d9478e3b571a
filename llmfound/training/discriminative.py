"""Optimizers whose learning rate differs from group to group of layers. Source: Howard and Ruder 2018, section 3.2."""

import keras
import numpy as np
from keras import ops

from llmfound import kernels
from llmfound.training.optimizers import Adam, AdamW


class Discriminative:
    """What an optimizer gains: a learning rate for each group of layers, in a fixed ratio to the optimizer's own.

    rate of group l = learning_rate ratio_l,  ratio_l = 1 / decay^(L - l) for l = 1 .. L from bottom to top
    Lower layers have lower rates. Source: Howard and Ruder 2018, section 3.2, with decay 2.6.

    The optimizer's own rate is the top group's: a number, a schedule, or what a callback sets; the ratios stay.
    Clipping by the global norm is over all groups at once. Decoupled weight decay goes with the group's rate. A group
    whose rate is 0 keeps weights and moments bit for bit, does not count in the global norm, and does not count the
    step, so that Adam's bias correction begins when the group does. `train` sets which groups have a rate, between any
    two steps, and no step is compiled anew for it. Moments are what the optimizer makes for each variable with
    `add_variable_from_reference`: the row and column statistics of Adafactor, made otherwise, move on in a group that
    waits, and so does the bias correction of Nadam, one number for all groups, which a group that begins late finds as
    it is.

    It comes before an optimizer of Keras in a class of both, as in DiscriminativeAdam; so for others:

        @keras.saving.register_keras_serializable("my_package")
        class DiscriminativeLion(llmfound.training.Discriminative, keras.optimizers.Lion):
            pass

    Args:
        learning_rate: float or schedule, the rate of the top group.
        groups: list of lists of built or unbuilt layers, from bottom to top, such as `model.layer_groups()`; in place
            of a layer may stand a variable, a variable's path, or, as in a saved optimizer, its place among the
            trainable ones. Every trainable variable belongs to exactly one group; a group may have none, as of a
            layer that is frozen, and keeps its place in the ratios.
        decay: float, what the rate of a group is divided by to give that of the group below; or a list of floats, the
            ratio of each group, from bottom to top.
        names: list of str, what the groups are called; None takes the names of their layers.
        **kwargs: of the optimizer of Keras.

    Raises:
        ValueError: if there is no group, a ratio is negative, or there are not as many ratios as groups; when the
            optimizer is built, if a trainable variable is in no group, or in more than one.
    """

    def __init__(self, learning_rate=0.001, groups=None, decay=2.6, names=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        if not groups or not any(groups) or not all(isinstance(group, (list, tuple)) for group in groups):
            raise ValueError(
                f"groups must be lists of layers, from bottom to top, such as model.layer_groups(); got {groups!r}."
            )
        count = len(groups)
        ratios = list(decay) if isinstance(decay, (list, tuple)) else [decay ** (i - count + 1) for i in range(count)]
        if len(ratios) != count or not all(np.isfinite(ratios)) or min(ratios) < 0:
            raise ValueError(f"decay must be a positive number, or {count} ratios, one for each group; got {decay!r}.")
        if names is not None and len(names) != count:
            raise ValueError(f"names must be one for each of the {count} groups; got {names}.")
        self.decay = decay
        self.names = names
        self.ratios = ratios
        self._groups = _Untracked(groups)
        self._slots = _Untracked({})  # key of a variable: the optimizer's variables that go with it
        self._updating = None  # the group of the variable that update_step is at
        self._waiting = _Untracked(frozenset())  # the groups that `train` has left out
        self.group_ratios = self.add_variable((count,), keras.initializers.Constant(ratios), name="group_ratios")
        self.group_steps = self.add_variable((count,), "zeros", name="group_steps")
        self.scale = self.add_variable((), "ones", name="scale")

    @property
    def group_names(self):
        """What the groups are called: the names of their layers, list of str, from bottom to top."""
        return self.names or [", ".join(dict.fromkeys(map(_name, group))) for group in self._groups.value]

    @property
    def filled_groups(self):
        """The groups that have a variable to train, list of int, 0 being the lowest; once the optimizer is built."""
        return sorted(set(self._members.value))

    @property
    def group_rates(self):
        """The rates of the next step, from bottom to top, list of float."""
        return [float(rate) for rate in ops.convert_to_numpy(self._rates())]

    @property
    def iterations(self):
        """Updates so far; inside of an update, those of the variable's group."""
        if self._updating is None:
            return super().iterations
        return self.group_steps[self._updating] // (self.gradient_accumulation_steps or 1)

    def train(self, groups):
        """Sets which groups are trained from the next step on; the others have the rate 0.

        Args:
            groups: iterable of int, 0 being the lowest group, negative ones from the top.

        Raises:
            ValueError: if there is no such group, or none is named.
        """
        wanted = list(groups)
        if not wanted:
            raise ValueError("groups must name at least one group to train; got none.")
        if any(not -len(self.ratios) <= i < len(self.ratios) for i in wanted):
            raise ValueError(f"There are {len(self.ratios)} groups, 0 to {len(self.ratios) - 1}; got {wanted}.")
        on = np.zeros(len(self.ratios), "float32")
        on[wanted] = 1
        self.group_ratios.assign(on * np.array(self.ratios, "float32"))
        if self.built:
            self._waiting.value = frozenset(np.flatnonzero(on == 0).tolist())
            for variable in self._trainable_variables:
                kernels.differentiate(variable, not self.leaves_out(variable))

    def leaves_out(self, variable):
        """Whether `train` has left out the group of a variable, which so needs no gradient; bool."""
        return bool(self._waiting.value) and self._group_of(variable) in self._waiting.value

    def build(self, variables):
        if self.built:
            return
        self._members = _Untracked(self._find_members(variables))
        super().build(variables)
        for variable in variables:  # a fit with another optimizer may have been interrupted
            kernels.differentiate(variable, True)

    def add_variable_from_reference(self, reference_variable, *args, **kwargs):
        variable = super().add_variable_from_reference(reference_variable, *args, **kwargs)
        self._slots.value.setdefault(self._var_key(reference_variable), []).append(variable)
        return variable

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        # A group that is not trained may have no gradients, on PyTorch.
        pairs = [(g, v) for g, v in zip(grads, variables) if g is not None or kernels.differentiate(v)]
        accumulated = self.gradient_accumulation_steps
        if self.clipnorm or self.global_clipnorm or accumulated:
            # An update's rate is that of its last batch: the schedule's may be 0 at others, which count all the same.
            on = (self._factors() if accumulated else self._rates()) > 0
            pairs = [(g if g is None else ops.where(on[self._group_of(v)], g, 0), v) for g, v in pairs]
        counts = ops.cast(self._rates() > 0, "float32")
        if accumulated:
            counts *= accumulated * ops.cast((self._iterations + 1) % accumulated == 0, "float32")
        super().apply(*zip(*pairs))
        self.group_steps.assign_add(counts)

    def update_step(self, gradient, variable, learning_rate):
        group = self._group_of(variable)
        rate = learning_rate * self._factors()[group]

        def update():
            self._updating = group
            try:
                super(Discriminative, self).update_step(gradient, variable, rate)
            finally:
                self._updating = None

        kernels.update_if(rate > 0, update, [variable, *self._slots.value.get(self._var_key(variable), [])])

    def _apply_weight_decay(self, variables):
        if self.weight_decay is None:
            return
        for variable in variables:
            if self._use_weight_decay(variable):
                rate = self._rates()[self._group_of(variable)] * self.weight_decay
                variable.assign(variable * (1 - ops.cast(rate, variable.dtype)))

    def get_config(self):
        groups = [[path for item in group for path in _paths(item)] for group in self._groups.value]
        if self.built:  # places, since the paths of a saved Sequential are others when it is loaded
            groups = [[i for i, k in enumerate(self._members.value) if k == group] for group in range(len(groups))]
        return {**super().get_config(), "groups": groups, "decay": self.decay, "names": self.group_names}

    def _factors(self):
        return ops.convert_to_tensor(self.group_ratios) * self.scale

    def _rates(self):
        return ops.cast(self.learning_rate, "float32") * self._factors()

    def _group_of(self, variable):
        return self._members.value[self._get_variable_index(variable)]

    def _find_members(self, variables):
        """The group of each variable, list of int."""
        found = {}  # path or place: groups
        known = {variable.path for variable in variables}
        for i, group in enumerate(self._groups.value):
            for path in {path for item in group for path in _paths(item)}:
                if isinstance(path, str) and path not in known:  # a loaded Sequential leaves its own name out
                    path = path.partition("/")[2]
                found.setdefault(path, []).append(i)
        members = [[*found.get(variable.path, []), *found.get(i, [])] for i, variable in enumerate(variables)]
        twice = {variable.path: groups for variable, groups in zip(variables, members) if len(groups) > 1}
        missing = [variable.path for variable, groups in zip(variables, members) if not groups]
        if twice or missing:
            parts = [f"{path} is in groups {groups}" for path, groups in twice.items()]
            parts += [f"in no group: {', '.join(missing)}"] * bool(missing)
            raise ValueError(f"Every trainable variable must be in exactly one group, but {'; '.join(parts)}.")
        return [groups[0] for groups in members]


class _Untracked:
    """Hides layers and variables from the optimizer's own bookkeeping."""

    def __init__(self, value):
        self.value = value


def _paths(item):
    """The paths of the variables of a layer, of a variable, or a path or place itself."""
    if isinstance(item, (str, int)):
        return [item]
    return [variable.path for variable in getattr(item, "trainable_variables", [item])]


def _name(item):
    """The name of a layer, or of that which a path belongs to."""
    if isinstance(item, int):
        return f"variable {item}"
    path = item if isinstance(item, str) else getattr(item, "path", item.name)
    if isinstance(item, keras.layers.Layer):
        return item.name
    return "/".join(path.split("/")[-2:-1]) or path


@keras.saving.register_keras_serializable("llmfound")
class DiscriminativeSGD(Discriminative, keras.optimizers.SGD):
    """keras.optimizers.SGD with a learning rate for each group of layers. See `Discriminative`."""


@keras.saving.register_keras_serializable("llmfound")
class DiscriminativeAdam(Discriminative, Adam):
    """Adam with a learning rate for each group of layers. See `Discriminative`.

    Howard and Ruder 2018, section 4.1, train with beta_1=0.7 and beta_2=0.99.
    """


@keras.saving.register_keras_serializable("llmfound")
class DiscriminativeAdamW(Discriminative, AdamW):
    """AdamW with a learning rate for each group of layers, on which its weight decay depends. See `Discriminative`."""
