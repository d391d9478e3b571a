"""Layer and Model: constructor arguments become the config, and a model's weights exist once it is constructed."""

import inspect

import keras


class Configured:
    """Rebuilds an object from its constructor arguments, and registers it, with no code in subclasses."""

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
        object.__setattr__(self, "_arguments", arguments)  # past Keras's tracking of attributes
        return self

    def get_config(self):
        arguments = {k: keras.saving.serialize_keras_object(v) for k, v in self._arguments.items()}
        return {**arguments, **super().get_config()}  # name, dtype and trainable as they are now

    @classmethod
    def from_config(cls, config):
        restore = keras.saving.deserialize_keras_object
        return cls(**{k: restore(v) if isinstance(v, dict) and "class_name" in v else v for k, v in config.items()})


class Layer(Configured, keras.layers.Layer):
    """A keras.layers.Layer whose config is its constructor arguments."""

    def get_build_config(self):
        return None  # sublayers are built by the first call, not from a stored shape


class _BuiltAfterInit(type(keras.Model)):
    def __call__(cls, *args, **kwargs):
        model = super().__call__(*args, **kwargs)  # the outermost __init__ has finished
        if not model.built:
            shapes = model.input_signature().items()
            model({k: keras.ops.zeros((1, *(n or 2 for n in shape)), "int32") for k, shape in shapes})
        return model


class Model(Configured, keras.Model, metaclass=_BuiltAfterInit):
    """A keras.Model whose weights exist as soon as it is constructed."""
