"""The mean of checkpoints."""

import zipfile

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

from llmfound.training import average_weights

X = np.ones((12, 3), "float32")


def make_model(units=2, dtype=None):
    layer = keras.layers.Dense(units, name="dense", dtype=dtype)
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dropout(0.1, name="dropout")], name="model")
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def values(model):
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


def randomize(model, seed):
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))


def write(model, path):
    if path.suffix == ".safetensors":
        save_file({weight.path: ops.convert_to_numpy(weight) for weight in model.trainable_weights}, path)
    elif path.suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    return path


@pytest.fixture(params=[".weights.h5", ".keras", ".safetensors"])
def ending(request):
    return request.param


def test_mean_is_that_of_numpy(tmp_path, ending):
    model, paths, arrays = make_model(), [], []
    for seed in range(3):
        randomize(model, seed)
        paths.append(write(model, tmp_path / f"{seed}{ending}"))
        arrays.append([ops.convert_to_numpy(weight) for weight in model.trainable_weights])
    expected = [np.mean(np.stack(group), axis=0, dtype="float64").astype("float32") for group in zip(*arrays)]
    mean = average_weights(paths)
    found = sorted(mean.values(), key=np.ndim, reverse=True)[:2]
    for array, exact in zip(found, sorted(expected, key=np.ndim, reverse=True)):
        assert array.dtype == "float32"
        np.testing.assert_array_equal(array, exact)


def test_mean_of_equal_checkpoints_is_the_checkpoint_bit_for_bit(tmp_path, ending):
    model = make_model()
    model.layers[0].kernel.assign([[-0.0, 1 / 3], [1e-40, 3e38], [np.pi, -1e-7]])
    before = values(model)
    paths = [write(model, tmp_path / f"{k}{ending}") for k in range(7)]
    randomize(model, 0)
    average_weights([str(path) for path in paths], None if ending == ".safetensors" else model)
    if ending == ".safetensors":
        mean = average_weights(paths)
        before = {path: array for path, array in before.items() if path in mean}
        after = mean
    else:
        after = values(model)
    for path, array in before.items():
        assert after[path].tobytes() == array.tobytes()


def test_mean_of_safetensors_into_a_model(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    zeros = {weight.path: np.zeros(weight.shape, "float32") for weight in model.weights}
    save_file(zeros, tmp_path / "a.safetensors")
    save_file({path: array + 3 for path, array in zeros.items()}, tmp_path / "b.safetensors")
    average_weights([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], model)
    for array in values(model).values():
        assert (array == 1.5).all()


def test_bfloat16(tmp_path):
    model = make_model(dtype="bfloat16")
    paths = []
    for k in (1, 2):
        model.layers[0].kernel.assign(np.full((3, 2), k))
        paths.append(write(model, tmp_path / f"{k}.weights.h5"))
    average_weights(paths, model)
    kernel = model.layers[0].kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(kernel, "float32")), 1.5)


def test_optimizer_keeps_its_state(tmp_path):
    model = make_model()
    path = write(model, tmp_path / "fresh.weights.h5")
    before = values(model)
    model.fit(X, X[:, :2], verbose=0)
    state = [ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    assert any(array.any() for array in state[2:])
    average_weights([path, path], model)
    for variable, array in zip(model.optimizer.variables, state):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), array)
    for path, array in values(model).items():
        np.testing.assert_array_equal(array, before[path])


def test_model_that_is_not_compiled_takes_the_mean(tmp_path):
    model = make_model()
    model.fit(X, X[:, :2], verbose=0)
    path = write(model, tmp_path / "a.weights.h5")
    other = keras.models.clone_model(model)
    average_weights([path], other)
    for mine, theirs in zip(other.trainable_weights, model.trainable_weights):
        np.testing.assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(theirs))


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_file_is_named(tmp_path, ending, cut):
    good = write(make_model(), tmp_path / f"good{ending}")
    bad = tmp_path / f"bad{ending}"
    bad.write_bytes(good.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"bad{ending} cannot be read"):
        average_weights([good, bad])


def test_damaged_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.keras", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.keras cannot be read"):
        average_weights([tmp_path / "empty.keras"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.weights\.h5 does not exist"):
        average_weights([tmp_path / "gone.weights.h5"])
    with pytest.raises(ValueError, match=r"\.safetensors; got .*weights\.pickle"):
        average_weights([tmp_path / "weights.pickle"])
    with pytest.raises(ValueError, match="got none"):
        average_weights([])


def test_shapes_and_names_that_differ_are_named(tmp_path, ending):
    small, big = (write(make_model(units), tmp_path / f"{units}{ending}") for units in (2, 4))
    with pytest.raises(ValueError, match=rf"2{ending} has \(.*2,?\) and .*4{ending} has \(.*4,?\)"):
        average_weights([small, big])
    none = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)], name="model")
    with pytest.raises(ValueError, match="nothing"):
        average_weights([small, write_any(none, tmp_path / f"none{ending}")])


def write_any(model, path):
    model.compile("sgd", "mse")
    return write(model, path)


def test_another_model_is_left_as_it_was(tmp_path, ending):
    path, other = write(make_model(), tmp_path / f"a{ending}"), make_model(4)
    before = values(other)
    with pytest.raises(ValueError, match="model 'model' has"):
        average_weights([path], other)
    for name, array in values(other).items():
        np.testing.assert_array_equal(array, before[name])
