"""Where weights begin."""

import keras
import numpy as np
import pytest

from llmfound import initializers, models


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def test_a_truncated_normal_is_saved_and_copied():
    initializer = initializers.TruncatedNormal(0.5, 0.1, seed=3)
    config = keras.saving.serialize_keras_object(initializer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is initializers.TruncatedNormal
    np.testing.assert_array_equal(numpy(initializer((4, 5))), numpy(again((4, 5))))
    first, second = (numpy(initializers.fresh(initializers.TruncatedNormal())((4, 5))) for _ in range(2))
    assert (first != second).any()


def test_weights_of_one_shape_begin_differently():
    block = models.BERT(11, 2, 8, 2, 16).encoder.blocks
    kernels = [numpy(layer.kernel) for b in block for layer in (b.attention.query, b.attention.key, b.attention.value)]
    assert all((a != b).any() for i, a in enumerate(kernels) for b in kernels[:i])
    assert np.std(kernels) == pytest.approx(0.02 * 0.88, rel=0.15)


def test_nothing_is_drawn_for_a_checkpoint_and_all_is_drawn_again_after_it():
    initializer = initializers.TruncatedNormal()
    with initializers.not_drawn():
        assert not numpy(initializer((4, 5))).any()
    with pytest.raises(KeyError):
        with initializers.not_drawn():
            raise KeyError
    assert numpy(initializer((4, 5))).all()
