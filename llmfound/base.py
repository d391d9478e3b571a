"""Layer and Model: constructor arguments become the config, and a model's weights exist once it is constructed."""

import inspect
import weakref

import keras
import numpy as np
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from llmfound import kernels
from llmfound.recomputation import Recomputed, within


class Configured:
    """Rebuilds an object from its constructor arguments, and registers it, with no code in subclasses.

    Arguments that may be changed later, as attributes of the same names, are listed in `settable`.
    """

    settable = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keras.saving.register_keras_serializable(cls.__module__.split(".")[0])(cls)

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls, *args, **kwargs)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # __init__ is about to raise it, better worded
            return self
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
            if parameter.kind is parameter.VAR_POSITIONAL:
                own = list(signature.parameters).index(name) - 1
                arguments.update(zip(_in_order(cls)[own:], arguments.pop(name, ())))
        object.__setattr__(self, "_arguments", arguments)  # past Keras's tracking of attributes
        return self

    def get_config(self):
        arguments = {k: keras.saving.serialize_keras_object(v) for k, v in {**self._arguments, **_set(self)}.items()}
        return {**arguments, **super().get_config()}  # name, dtype and trainable as they are now

    @classmethod
    def from_config(cls, config):
        restore = keras.saving.deserialize_keras_object
        return cls(**{k: restore(v) if isinstance(v, (dict, list, tuple)) else v for k, v in config.items()})


def _set(layer):
    """{name: value} of the arguments of a layer that were changed after it was made."""
    names = (name for name in getattr(layer, "settable", ()) if name in layer._arguments)
    return {name: getattr(layer, name) for name in names if getattr(layer, name) != layer._arguments[name]}


def _in_order(cls):
    """Names of the arguments that a class takes in order, those that its *args hands on to its parent included."""
    names = []
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        own = list(inspect.signature(init).parameters.values())[1:]
        names += [parameter.name for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in own):
            break
    return names


_listing = weakref.WeakSet()  # layers that, on PyTorch, list as their parameters those of all layers inside


class BuiltByCall:
    """Sublayers are built when the first call comes to them; `build` itself makes nothing.

    Without a `build`, Keras traces a call once more for each layer around it, only to find what is to be built: to make
    a Transformer took ten seconds on TensorFlow.
    """

    def build(self, input_shape):  # as in keras.Layer, so that a file tells every backend the same
        pass

    if keras.backend.backend() == "torch":

        def __call__(self, *args, **kwargs):  # Keras lists a module's parameters when `build` returns
            first = not self.built
            result = super().__call__(*args, **kwargs)
            if first:
                self._post_build()
            return result

        def _track_variables(self):
            super()._track_variables()
            _listing.add(self)

        def forward(self, *args, **kwargs):  # what Keras's full call comes to, `training` found
            if "training" not in kwargs:
                return super().forward(*args, **kwargs)
            outer, within.training = getattr(within, "training", "unknown"), kwargs["training"]
            try:
                return super().forward(*args, **kwargs)
            finally:
                within.training = outer


class Direct:
    """A layer that leaves out Keras's bookkeeping, 0.1 ms a call, where `kernels.direct_call` says it may.

    Layers inside that are not told `training` take it from the full call around them. So a layer whose result depends
    on `training` is called directly only if it is told what holds there. To be told None is not to be told: Keras would
    pass it on to the layers inside, and turn dropout off in a block whose `call(self, x, **kwargs)` hands on what it
    gets, which is never `training`.
    """

    heeds_training = False

    def __call__(self, *args, **kwargs):
        if "training" in kwargs and kwargs["training"] is None:
            del kwargs["training"]
        if keras.backend.backend() == "torch":
            known = not self.heeds_training or kwargs.get("training") is getattr(within, "training", "unknown")
            if known and args and self.built and kernels.direct_call(self, args, kwargs):
                try:
                    given, mask = _masks(self, args, kwargs)
                    if mask is None:
                        return self.call(*args, **given)
                    if self.supports_masking:
                        result = self.call(*args, **given)
                        self._set_mask_metadata(args[0], result, mask)
                        return result
                except Exception:  # the full call says more about it
                    pass
        return super().__call__(*args, **kwargs)


class KeepsAdapter:
    """A layer of Keras whose LoRA goes on learning once it is loaded: Keras 3.15.1 sets both its factors to zero.

    A file holds the product of weights and factors, and the second factor alone begins at zero again. And on PyTorch,
    where optimizers and state_dict() ask the layers around, those list the factors among their parameters.
    """

    def enable_lora(self, *args, **kwargs):
        super().enable_lora(*args, **kwargs)
        for layer in list(_listing):
            if any(part is self for part in layer._flatten_layers()):
                for variable in self._trainable_variables:
                    layer._post_track_variable(variable)

    def load_own_variables(self, store):
        first = [v for v in self._trainable_variables if v.name in ("lora_kernel_a", "lora_embeddings_a")]
        before = [keras.ops.copy(v) for v in first]
        super().load_own_variables(store)
        for variable, value in zip(first, before):
            variable.assign(value)


def _masks(layer, args, kwargs):
    """The keyword arguments with the masks that tensors bring, and the mask of the result, as the full call has them.

    Where one tensor is given its mask becomes `mask`; where there are more, that of `x` becomes `x_mask`.
    """
    if any(hasattr(x, "_keras_mask") for x in (*args, *kwargs.values())):
        names = layer.call_signature_parameters
        tensors = {k: x for k, x in (*zip(names, args), *kwargs.items()) if keras.ops.is_tensor(x)}
        for k, x in tensors.items():
            name = f"{k}_mask" if len(tensors) > 1 else "mask"
            if name in names and kwargs.get(name) is None:
                kwargs = {**kwargs, name: getattr(x, "_keras_mask", None)}
    mask = kwargs.get("mask")
    return kwargs, getattr(args[0], "_keras_mask", None) if mask is None else mask


class Layer(Direct, Recomputed, BuiltByCall, Configured, keras.layers.Layer):
    """A keras.layers.Layer whose config is its constructor arguments."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.heeds_training = "training" in inspect.signature(cls.call).parameters

    def compute_output_shape(self, *shapes, **named):
        """For one input, by a trace of `call`: wrappers such as keras.layers.TimeDistributed ask for it."""
        if named or len(shapes) != 1:
            return super().compute_output_shape(*shapes, **named)
        spec = self.compute_output_spec(keras.KerasTensor(shapes[0], self.compute_dtype))
        return keras.tree.map_structure(lambda x: x.shape, spec)

    def compute_output_spec(self, *args, **kwargs):
        if overrides(self, Layer, "compute_output_shape"):
            return super().compute_output_spec(*args, **kwargs)
        return keras.Operation.compute_output_spec(self, *args, **kwargs)  # a trace: it tells dtypes as well

    def get_build_config(self):
        """What each sublayer was built from: a shape for the layer as a whole would not say how to call it."""
        sublayers = [layer.get_build_config() for layer in self._layers]
        return {"own": super().get_build_config(), "sublayers": sublayers, **_changes(self)}

    def build_from_config(self, config):
        with self._open_name_scope():
            for layer, sublayer_config in zip(self._layers, config["sublayers"]):
                if not layer.built:  # a layer given as an argument brings its own
                    layer.build_from_config(sublayer_config)
        super().build_from_config(config["own"])
        _change(self, config)


def _changes(layer):
    """What was done to sublayers after they were made, which no constructor tells: frozen, adapted, quantized, set.

    By their places in the layer. Keras itself keeps it for the layers of functional models only.
    """
    found = {}
    for place, part in enumerate(layer._flatten_layers(include_self=False)):
        change, trained = {}, [variable.trainable for variable in part._trainable_variables]
        if not part.trainable or not all(trained):
            change["trainable"] = [part.trainable, *trained]
        if getattr(part, "lora_enabled", False):
            change["lora"] = [part.lora_rank, part.lora_alpha]
        if part.quantization_mode is not None:
            config = keras.saving.serialize_keras_object(getattr(part, "quantization_config", None))
            change["quantized"] = [part.quantization_mode, config]
        if values := _set(part):
            change["set"] = values
        if change:
            found[str(place)] = {"class": type(part).__name__, **change}
    return {"changes": found} if found else {}


def _change(layer, config):
    """Does to built sublayers what `_changes` told; a layer given as an argument may have brought it."""
    changes, parts = config.get("changes", {}), list(layer._flatten_layers(include_self=False))
    for place, change in changes.items():
        part = parts[int(place)] if int(place) < len(parts) else None
        if type(part).__name__ != change["class"]:
            raise ValueError(f"{layer.name} was saved with a {change['class']} as sublayer {place}; here it is {part}.")
        if "quantized" in change and part.quantization_mode is None:
            mode, settings = change["quantized"]
            part.quantize(mode, config=keras.saving.deserialize_keras_object(settings))
        if "lora" in change and not part.lora_enabled:
            part.enable_lora(*change["lora"])
        for name, value in change.get("set", {}).items():
            setattr(part, name, value)
        if "trainable" in change:  # the setter would change what is inside as well
            part._trainable, *trained = change["trainable"]
            for variable, value in zip(part._trainable_variables, trained):
                variable.trainable = value


def overrides(layer, base, *names):
    """Whether a layer's class has other methods of these names than `base`."""
    return any(getattr(type(layer), name) is not getattr(base, name) for name in names)


def _plain(layer):
    one_dtype = layer.compute_dtype == layer.variable_dtype
    return one_dtype and layer.quantization_mode is None and layer.activity_regularizer is None


def lean(layer, x):
    """layer(x) without Keras's bookkeeping, 0.1 ms a call, for decoding loops; the full call where it is needed."""
    if not _plain(layer):
        return layer(x)
    if type(layer).call is keras.layers.LayerNormalization.call and layer.axis == [-1] and not layer.rms_scaling:
        return kernels.layer_norm(x, layer.gamma, layer.beta, layer.epsilon)
    return layer.call(x)


def plain(size):
    """An int for one of NumPy's, such as ids.max() + 1, which Keras's embeddings refuse."""
    return int(size) if isinstance(size, np.integer) else size


def is_known(length):
    """Whether this is the length of a sequence, and does not stand for any while a backend traces.

    On PyTorch, where only shapes are asked for, Keras (3.15.1) puts 83 and then 89 for a length that is open.
    """
    return isinstance(length, int) and not (length in (83, 89) and in_symbolic_scope())


def _integers(x):
    """The ids of a trace, which Keras takes for floats where it builds a user's model around this one from a file."""
    is_float = hasattr(x, "dtype") and keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))
    return keras.ops.cast(x, "int32") if is_float else x


class _BuiltAfterInit(type(keras.Model)):
    def __call__(cls, *args, **kwargs):
        model = super().__call__(*args, **kwargs)  # the outermost __init__ has finished
        if not model.built:
            shapes = {k: (1, *(n or 2 for n in shape)) for k, shape in model.input_signature().items()}
            if keras.backend.backend() == "tensorflow" or not cls._built_by_a_trace(model, shapes):
                model({k: keras.ops.zeros(shape, "int32") for k, shape in shapes.items()})
        return model

    def _built_by_a_trace(cls, model, shapes):
        """Builds without numbers, which saves JAX from compiling each operation; TensorFlow's traces take longer."""
        if overrides(model, keras.Model, "compute_output_shape", "compute_output_spec"):
            return False  # Keras would ask these, and not look into `call`
        try:
            with model._open_name_scope():
                model.compute_output_spec({k: keras.KerasTensor(shape, "int32") for k, shape in shapes.items()})
        except Exception:  # a call that needs numbers, or fails: with numbers it says why
            return False
        model.build(shapes)
        return True


class _OneShape(keras.callbacks.Callback):
    """Ends `predict` at a batch whose outputs it could not join to the others', which Keras would find at its end."""

    def __init__(self):
        super().__init__()
        self.shapes = {}

    def on_predict_batch_end(self, batch, logs=None):
        for path, x in keras.tree.flatten_with_path(logs):
            shape = tuple(x.shape)[1:] if hasattr(x, "shape") else None  # of one number Keras makes a float
            if shape is not None and self.shapes.setdefault(path, shape) != shape:
                raise ValueError(
                    f"predict joins what {self.model.name} finds in all batches; in batch {batch} a row is of shape "
                    f"{shape}, before it of {self.shapes[path]}. Make all batches equally long, as "
                    "length_multiple=max_length does, or call predict_on_batch with each."
                )


class Model(Recomputed, BuiltByCall, Configured, keras.Model, metaclass=_BuiltAfterInit):
    """A keras.Model whose weights exist as soon as it is constructed, and which checks the ids it is given.

    A subclass tells in `input_signature()` the names and shapes of its inputs, a dict of integer arrays, and may tell
    in `input_limits()` how large the ids may be. Where one input alone is needed, its array will do for the dict.
    """

    repeated_in_parts = True
    pad_id = None  # the token that fills up short sequences, where there is one

    def input_signature(self):
        """Names and shapes, without the batch axis, of the inputs: for instance {"token_ids": (None,)}."""
        raise NotImplementedError(f"{type(self).__name__} must define input_signature(), its inputs' names and shapes.")

    def optional_inputs(self):
        """Names and shapes of the inputs that may be left out; they may also hold bool."""
        return {}

    def input_limits(self):
        """The number each input's ids must stay below, by name: for instance {"token_ids": vocab_size}."""
        return {}

    def get_config(self):
        return {**super().get_config(), **_changes(self)}

    @classmethod
    def from_config(cls, config):
        model = super().from_config({k: v for k, v in config.items() if k != "changes"})
        _change(model, config)
        return model

    def check_inputs(self, inputs):
        """Raises ValueError unless the inputs that are there have integer type, the right rank, and ids in range.

        The range is checked where the numbers are at hand: in NumPy arrays, not inside a compiled step.
        """
        limits, optional = self.input_limits(), self.optional_inputs()
        for name, shape in {**self.input_signature(), **optional}.items():
            x = inputs.get(name)
            if x is None:
                continue
            dtype = keras.backend.standardize_dtype(x.dtype) if hasattr(x, "dtype") else "object"
            if "int" not in dtype and not (dtype == "bool" and name in optional):
                raise ValueError(f"{name} must hold integers; got {dtype}, shape {tuple(np.shape(x))}.")
            if len(x.shape) != 1 + len(shape):
                raise ValueError(f"{name} must be of shape {('batch', *shape)}; got {tuple(x.shape)}.")
            if not isinstance(x, np.ndarray):
                continue
            if x.size == 0:
                raise ValueError(f"{name} is empty: shape {x.shape}; it needs at least one row and one token.")
            low, high, limit = x.min(), x.max(), limits.get(name, np.inf)
            if low < 0 or high >= limit:
                raise ValueError(f"{name} must hold ids from 0 to {limit - 1}; got {low} to {high}.")

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(self._checked(inputs), *args, **kwargs)

    def stateless_call(self, trainable_variables, non_trainable_variables, inputs, *args, **kwargs):
        """Keras's, which JAX's steps make in place of `__call__`."""
        inputs = self._checked(inputs)
        return super().stateless_call(trainable_variables, non_trainable_variables, inputs, *args, **kwargs)

    def check_padding(self, batches, labels=True):
        """Raises ValueError if batches are filled up with another token than this model, its loss and metrics know.

        Padding would else be read and learnt as text, without a word.
        """
        given, label = getattr(batches, "pad_id", None), getattr(batches, "label_pad_id", None)
        if None not in (given, self.pad_id) and given != self.pad_id:
            raise ValueError(
                f"{type(batches).__name__} fill up short sequences with token {given}, and {type(self).__name__} was "
                f"made for pad_id={self.pad_id}: make it with pad_id={given}, or the batches with its own tokenizer."
            )
        if label is None or not (labels and self.compiled):
            return
        measured = getattr(self._compile_metrics, "_user_metrics", None)
        for part in keras.tree.flatten([self.loss, measured]):
            known = getattr(part, "pad_id", getattr(part, "ignore_class", None))
            if known is not None and known != label:
                raise ValueError(
                    f"{type(batches).__name__} fill up labels with {label}, and {type(part).__name__} leaves out "
                    f"{known}: give it {label} for that."
                )

    def _checked(self, x):
        """The inputs as a dict, or the data that has them, as it is; errors as in `check_inputs`."""
        needed = list(self.input_signature())
        array = keras.ops.is_tensor(x) or hasattr(x, "__array__")  # a dataset may have a shape as well
        if array and len(needed) == 1:
            x = {needed[0]: x}
        elif array or isinstance(x, (list, tuple)):
            raise ValueError(
                f"{type(self).__name__} takes a dict of arrays, {', '.join(needed)}; got {type(x).__name__}."
            )
        if isinstance(x, dict):
            if in_symbolic_scope():
                x = {name: _integers(value) for name, value in x.items()}
            self.check_inputs(x)
            missing = self.input_signature().keys() - x.keys()
            if missing:
                raise ValueError(f"{type(self).__name__} also needs {sorted(missing)}; got {sorted(x)}.")
            known = {**self.input_signature(), **self.optional_inputs()}
            if x.keys() - known.keys():
                raise ValueError(
                    f"{type(self).__name__} takes {', '.join(known)}; got {', '.join(sorted(x.keys() - known.keys()))}."
                )
        return x

    def _check_class_weight(self, x, y=None, *args, class_weight=None, **kwargs):
        """Raises ValueError if a row has several labels: Keras takes the place of the greatest one for its class."""
        if class_weight is None:
            return
        batch = x[0] if isinstance(x, keras.utils.PyDataset) else (x, y)
        y = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
        if isinstance(y, dict):
            found = f"the labels are {', '.join(y)}"
        else:
            labels = np.asarray([] if y is None else keras.ops.convert_to_numpy(y))
            if labels.ndim < 2 or labels.dtype.kind not in "iu" or not np.sort(labels)[..., :-1].any():  # one-hot
                return
            found = f"the labels are of shape {labels.shape}"
        raise ValueError(
            f"class_weight is for rows of one class each, and {found}. Let the data give each label its weight, as "
            "(x, y, weights)."
        )

    def fit(self, x=None, *args, **kwargs):
        if getattr(x, "in_order", False):  # batches that go on from each other, which Keras would shuffle
            if kwargs.setdefault("shuffle", False):
                raise ValueError(f"{type(x).__name__} must be read in order; leave out shuffle={kwargs['shuffle']!r}.")
        self._build_optimizer()
        for batches in (x, kwargs.get("validation_data")):
            self.check_padding(batches)
        self._check_class_weight(x, *args, **kwargs)
        return super().fit(self._checked(x), *args, **kwargs)

    _exporting = False

    @property
    def input_dtype(self):
        """Keras's, but while it exports, which Keras 3.15.1 would do for inputs of float32 else: that of ids."""
        return "int32" if self._exporting else super().input_dtype

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As Keras's, for batches and sequences of any length unless `input_signature` tells others.

        A program of PyTorch, format="torch", takes the sizes it was made with alone: tell them.

        What it exports takes the inputs that a model needs. For more, such as a BERT's "segment_ids", pass
        input_signature=[{"token_ids": keras.InputSpec("int32", (None, None), name="token_ids"), "segment_ids": ...}].

        Raises:
            NotImplementedError: for a SavedModel on PyTorch, of which Keras (3.15.1) makes none of a dict of inputs.
        """
        if keras.backend.backend() == "torch" and format == "tf_saved_model":
            raise NotImplementedError(
                'On PyTorch Keras makes no SavedModel of a model that takes a dict of inputs. Take format="torch" and '
                "an input_signature of fixed sizes, or save a .keras file, and load and export that with "
                "KERAS_BACKEND=tensorflow."
            )
        if input_signature is None:
            shapes = self.input_signature().items()
            input_signature = [{k: keras.InputSpec("int32", (None, *shape), name=k) for k, shape in shapes}]
        self._exporting = True
        try:
            return super().export(filepath, format, verbose, input_signature, **kwargs)
        finally:
            self._exporting = False

    def _build_optimizer(self):
        """Before the first step, as Keras does on JAX and torch; TensorFlow would make its variables inside the step.

        That takes it a third of the time that it needs to trace the step.
        """
        optimizer = getattr(self, "optimizer", None)
        if keras.backend.backend() == "tensorflow" and optimizer and not optimizer.built and self.built:
            with self.distribute_strategy.scope():
                optimizer.build(self.trainable_variables)

    def make_train_function(self, force=False):
        """As Keras; each trainable variable gets its gradient again, unless the model's own optimizer leaves it out.

        On torch, a fit with GradualUnfreezing that was interrupted leaves some without, which other models may share.
        """
        if self.train_function is None:
            for variable in self.trainable_variables:
                kernels.differentiate(variable, True)
        elif keras.backend.backend() == "torch":
            optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
            for variable in getattr(optimizer, "_trainable_variables", ()):
                waits = hasattr(optimizer, "leaves_out") and optimizer.leaves_out(variable)
                if variable.trainable and not waits and not kernels.differentiate(variable):
                    kernels.differentiate(variable, True)
        return super().make_train_function(force)

    if keras.backend.backend() == "torch":

        def train_step(self, data):
            """As Keras's, but the last step's gradients are freed before the forward pass, not after it.

            There they would stand beside all that it keeps for the backward pass.
            """
            self.zero_grad()
            return super().train_step(data)

    def evaluate(self, x=None, *args, **kwargs):
        self.check_padding(x)
        return super().evaluate(self._checked(x), *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        if getattr(x, "order_varies", False):
            remedy = "make them with shuffle=False" if hasattr(x, "shuffle") else "call predict_on_batch with each"
            raise ValueError(
                f"{type(x).__name__}: shuffled batches give predictions in an order that nobody knows; {remedy}."
            )
        self.check_padding(x, labels=False)
        callbacks = kwargs.get("callbacks")
        alone = len(args) < 4 and not isinstance(callbacks, keras.callbacks.CallbackList)
        if alone and keras.backend.backend() != "tensorflow":  # which joins them to a ragged tensor
            kwargs["callbacks"] = [*keras.tree.flatten(callbacks or []), _OneShape()]
        return super().predict(self._checked(x), *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._build_optimizer()
        self._check_class_weight(x, *args, **kwargs)
        return super().train_on_batch(self._checked(x), *args, **kwargs)

    def test_on_batch(self, x, *args, **kwargs):
        return super().test_on_batch(self._checked(x), *args, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self._checked(x))
