"""Overrides for TensorFlow."""

import weakref

import keras
import numpy as np
import tensorflow as tf

__all__ = ["token_cross_entropy", "adam_update", "compiled"]

_programs = weakref.WeakKeyDictionary()  # model: {(function, static): its graph}


def token_cross_entropy(logits, labels, smoothing=0.0):
    """One fused operation computes loss and gradient; see `reference.token_cross_entropy`."""
    logits = tf.cast(logits, "float32")
    classes = tf.shape(logits)[-1]
    other = smoothing / tf.cast(classes, "float32")
    target = tf.one_hot(tf.cast(labels, "int32"), classes, on_value=1 - smoothing + other, off_value=other)
    return tf.nn.softmax_cross_entropy_with_logits(target, logits)


def adam_update(variable, gradient, momentum, velocity, learning_rate, step, beta_1, beta_2, epsilon):
    """TensorFlow's fused Adam; see `reference.adam_update`."""
    var, m, v = (v if isinstance(v, tf.Variable) else v.value for v in (variable, momentum, velocity))
    dtype = var.dtype
    tf.raw_ops.ResourceApplyAdam(
        var=var.handle, m=m.handle, v=v.handle, beta1_power=tf.cast(tf.pow(beta_1, step), dtype),
        beta2_power=tf.cast(tf.pow(beta_2, step), dtype), lr=tf.cast(learning_rate, dtype), beta1=beta_1,
        beta2=beta_2, epsilon=epsilon, grad=tf.cast(tf.convert_to_tensor(gradient), dtype),
    )  # fmt: skip


def compiled(model, function, *static):
    """A graph for the shapes of the arrays, which reads the variables as they are; see `reference.compiled`."""
    programs = _programs.setdefault(model, {})

    def call(*arrays):
        shapes = tuple((x.shape, x.dtype) for x in keras.tree.flatten(arrays))
        key = function, static, shapes  # one tf.function each: it takes many shapes for a mistake and warns
        if key not in programs:
            programs[key] = _program(weakref.ref(model), function, static)
        return keras.tree.map_structure(np.asarray, programs[key](*arrays))

    return call


def _program(model, function, static):
    # On a CPU XLA is no faster than the graph, and takes longer to compile.
    @tf.function(autograph=False, jit_compile=bool(tf.config.list_physical_devices("GPU")))
    def program(*arrays):
        return function(model(), *static, *arrays)

    return program
