"""No loader runs code from a file: hostile files are refused with an error, and what they would do does not happen."""

import ast
import gzip
import io
import json
import os
import pathlib
import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest

import llmfound
import llmfound.testing
from llmfound.training import Checkpoints, average_weights, checkpoints

X = np.ones((4, 3), "float32")
PACKAGE = pathlib.Path(llmfound.__file__).parent


@pytest.fixture
def trap(tmp_path):
    """A path; code that a hostile file brings along would make a folder there."""
    path = tmp_path / "trap"
    yield path
    assert not path.exists(), "the code in the file ran"


class Payload:
    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


def pickled(trap):
    return pickle.dumps(Payload(trap))


def make_model(layer=None):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense"), *([layer] if layer else [])])
    model.compile("adam", "mse")
    return model


def rewritten(path, **entries):
    """The .keras file with other content for some of its entries, None for none."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    found.update({name.replace("__", "."): content for name, content in entries.items()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in found.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def hostile_config(path, edit):
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    edit(config)
    return rewritten(path, config__json=json.dumps(config))


def dense(config):
    return next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Dense")


def in_activation(value):
    return lambda config: dense(config)["config"].update(activation=value)


def in_place_of_the_layer(value):
    return lambda config: config["config"]["layers"].append(value)


def hostile_keras_files(folder, trap):
    """(what it is, path) of .keras files that carry code, or name it."""

    def saved(name):
        path = folder / f"{name}.keras"
        make_model().save(path)
        return path

    action = f"__import__('os').makedirs({str(trap)!r}, exist_ok=True)"
    layer = keras.layers.Lambda(eval(f"lambda x: {action} or x"))
    make_model(layer).save(folder / "lambda.keras")
    trap.rmdir()  # the model ran it as it was made
    yield folder / "lambda.keras"
    with zipfile.ZipFile(folder / "lambda.keras") as archive:
        layers = json.loads(archive.read("config.json"))["config"]["layers"]
    function = next(layer for layer in layers if layer["class_name"] == "Lambda")["config"]["function"]
    yield hostile_config(saved("lambda-activation"), in_activation(function))
    for name, entry in {
        "function": {"module": "os", "class_name": "function", "config": "mkdir", "registered_name": "mkdir"},
        "builtin": {"module": "builtins", "class_name": "function", "config": "exec", "registered_name": "exec"},
        "object": {"module": "subprocess", "class_name": "Popen", "config": {"args": ["mkdir", str(trap)]}},
        "path": {"module": "pathlib", "class_name": "Path", "config": {}, "registered_name": None},
    }.items():
        yield hostile_config(saved(name), in_activation(entry))
        yield hostile_config(saved(f"{name}-layer"), in_place_of_the_layer(entry))
    yield rewritten(saved("weights"), model__weights__h5=pickled(trap))
    objects = io.BytesIO()
    np.savez(objects, dense=np.array([Payload(trap)], dtype=object))
    yield rewritten(saved("objects"), model__weights__h5=None, model__weights__npz=objects.getvalue())
    yield rewritten(saved("config"), config__json=pickled(trap))
    (folder / "pickle.keras").write_bytes(pickled(trap))
    yield folder / "pickle.keras"


def test_the_traps_work(tmp_path, trap):
    path = next(hostile_keras_files(tmp_path, trap))
    for run in (lambda: pickle.loads(pickled(trap)), lambda: keras.saving.load_model(path, safe_mode=False)):
        run()
        trap.rmdir()


def test_keras_files(tmp_path, trap):
    for path in hostile_keras_files(tmp_path, trap):
        for load in (
            lambda path: keras.saving.load_model(path, compile=False),  # as examples/translate.py does
            keras.saving.load_model,
            lambda path: llmfound.testing.compare_backends(str(path), X),
        ):
            with pytest.raises((ValueError, TypeError, OSError, KeyError)) as error:
                load(path)
            assert str(error.value), path.name
            assert not trap.exists(), path.name


def test_keras_file_that_names_what_would_compile_it(tmp_path, trap):
    make_model().save(tmp_path / "model.keras")
    popen = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["mkdir", str(trap)]}}
    path = hostile_config(tmp_path / "model.keras", lambda config: config["compile_config"].update(optimizer=popen))
    try:
        keras.saving.load_model(path)  # Keras may go on without the optimizer
    except (ValueError, TypeError):
        pass
    assert not trap.exists()


def test_keras_file_whose_entries_point_elsewhere(tmp_path, trap):
    make_model().save(tmp_path / "model.keras")
    path = rewritten(tmp_path / "model.keras", **{f"assets/../../{trap.name}/x": b"x", f"{trap}/x": b"x"})
    for load in (keras.saving.load_model, lambda path: average_weights([path], make_model())):
        try:
            load(path)
        except (ValueError, OSError):
            pass
        assert not trap.exists() and not (tmp_path.parent / trap.name).exists()


def hostile_h5_files(folder):
    """Files of weights that would read another file, or fill the memory, or be no numbers."""
    secret = folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["0"] = np.full((3, 2), 42.0, "float32")
    (folder / "secret.bin").write_bytes(np.full((3, 2), 42.0, "float32").tobytes())

    def opened(name):
        path = folder / f"{name}.weights.h5"
        make_model().save_weights(path)
        file = h5py.File(path, "r+")
        del file["layers/dense/vars/0"]
        return path, file, file["layers/dense/vars"]

    path, file, group = opened("link")
    group["0"] = h5py.ExternalLink(str(secret), "0")
    file.close()
    yield path
    path, file, group = opened("external")
    group.create_dataset("0", (3, 2), "float32", external=[(str(folder / "secret.bin"), 0, 24)])
    file.close()
    yield path
    path, file, group = opened("virtual")
    layout = h5py.VirtualLayout((3, 2), "float32")
    layout[:] = h5py.VirtualSource(str(secret), "0", (3, 2))
    group.create_virtual_dataset("0", layout)
    file.close()
    yield path
    path, file, group = opened("huge")
    group.create_dataset("0", (2**40, 2), "float32", chunks=(1024, 2))
    file.close()
    yield path
    path, file, group = opened("compressed")
    group.create_dataset("0", data=np.zeros((2**20, 2), "float32"), compression="gzip")
    file.close()
    yield path
    path, file, group = opened("objects")
    group["0"] = np.zeros((3, 2), "uint64")
    group["0"].attrs["dtype"] = "O"
    file.close()
    yield path
    path, file, group = opened("strings")
    group["0"] = np.array([b"cos\nsystem\n(S'x'\ntR."] * 2, dtype=h5py.string_dtype())
    file.close()
    yield path


def test_average_of_h5_files(tmp_path):
    model = make_model()
    before = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    for path in hostile_h5_files(tmp_path):
        with pytest.raises(ValueError, match=path.name):
            average_weights([path], model)
        archived = tmp_path / f"{path.name}.keras"
        make_model().save(archived)
        with pytest.raises(ValueError, match=path.name):
            average_weights([rewritten(archived, model__weights__h5=path.read_bytes())], model)
    for weight, array in zip(model.weights, before):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), array)


@pytest.mark.parametrize("ending", [".weights.h5", ".keras", ".safetensors"])
def test_average_of_a_pickle(tmp_path, trap, ending):
    path = tmp_path / f"bad{ending}"
    path.write_bytes(pickled(trap))
    with pytest.raises(ValueError, match=f"bad{ending} cannot be read"):
        average_weights([path], make_model())


def test_average_of_an_archive_that_would_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**24))
    with pytest.raises(ValueError, match=r"bomb\.keras .* 16777216 bytes, more than the file"):
        average_weights([tmp_path / "bomb.keras"])


def header(entries, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


HOSTILE_SAFETENSORS = {
    "no header": b"",
    "endless header": header({}, 2**63),
    "no JSON": header(b"\x80\x04K\x01."),
    "outside": header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}}),
    "backwards": header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8),
    "overflow": header({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "objects": header({"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
    "entry": header({"__metadata__": {"llmfound": "__import__('os')"}}),
    "nested": header({"__metadata__": {"llmfound": "[" * 100_000}}),
    "list": header({"__metadata__": {"llmfound": "[1]"}}),
    "null": header({"__metadata__": {"llmfound": '{"version": 1, "place": null, "sha256": null}'}}),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_safetensors(tmp_path, name):
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(HOSTILE_SAFETENSORS[name])
    with pytest.raises(ValueError, match=path.name):
        average_weights([path], make_model())
    with pytest.raises(ValueError, match=f"(?s)no checkpoint in .* can be used.*{path.name}"):
        make_model().fit(X, X[:, :2], verbose=0, callbacks=[Checkpoints(tmp_path, steps=1)])
    assert path.exists()


def test_checkpoint_that_is_a_pickle(tmp_path, trap):
    (tmp_path / "step-000000001.safetensors").write_bytes(pickled(trap))
    with pytest.raises(ValueError, match="can be used"):
        make_model().fit(X, X[:, :2], verbose=0, callbacks=[Checkpoints(tmp_path, steps=1)])


def test_checkpoint_with_a_place_of_another_kind(tmp_path):
    model, written = make_model(), Checkpoints(tmp_path, steps=1)
    model.fit(X, X[:, :2], verbose=0, callbacks=[written])
    arrays, place = checkpoints.read_checkpoint(written.paths[-1])
    for bad in (
        {},
        [1],
        {**place, "epoch": "1"},
        {**place, "batch": -1},
        {**place, "more": 1},
        {**place, "epoch": True},
    ):
        checkpoints.write_checkpoint(written.paths[-1], arrays, bad)
        with pytest.raises(ValueError, match="does not tell its place"):
            make_model().fit(X, X[:, :2], verbose=0, callbacks=[Checkpoints(tmp_path, steps=1)])


def test_tokenizer_and_text(tmp_path, trap):
    for name in ("tokenizer.json", "text.tsv", "text.gz", "text.xz"):
        (tmp_path / name).write_bytes(pickled(trap))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(pickled(trap)))
    (tmp_path / "object.json").write_text('{"py/object": "os.mkdir", "version": "1.0", "model": {"type": "Popen"}}')
    for name in ("tokenizer.json", "object.json"):
        for kind in (llmfound.data.Tokenizer, llmfound.data.WordTokenizer, llmfound.data.WordPiece):
            with pytest.raises(ValueError):
                kind.load(tmp_path / name)
    for name in ("text.tsv", "text.gz", "text.xz", "packed.gz"):
        for read in (llmfound.data.read_lines, llmfound.data.read_pairs):
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name)


def test_checkpoints_of_other_libraries(tmp_path, trap):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(pickled(trap))
    with pytest.raises(ValueError, match=r"config\.json"):
        llmfound.convert.from_huggingface(tmp_path)
    with pytest.raises(ValueError):
        llmfound.data.WordPiece.load(tmp_path)
    sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        llmfound.convert.from_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    outside = {"weight_map": {"a": "../model.safetensors", "b": "/etc/hosts"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(FileNotFoundError):
        llmfound.convert.from_huggingface(tmp_path)


def test_mapped_documents_and_questions(tmp_path, trap):
    np.save(tmp_path / "ids.npy", np.array([Payload(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        llmfound.data.Documents.open(tmp_path)
    (tmp_path / "dev.json").write_bytes(pickled(trap))
    with pytest.raises(ValueError, match=r"dev\.json, line 1: byte 0x80 at offset 0 is not valid UTF-8"):
        llmfound.data.read_squad(tmp_path / "dev.json")


def test_download_that_was_exchanged(tmp_path, trap):
    name = next(iter(llmfound.data.text.HASHES))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickled(trap))
    with pytest.raises(ValueError, match="SHA-256"):
        llmfound.data.fetch(name, tmp_path)


UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "keras.config.enable_unsafe_deserialization"}
UNSAFE_ARGUMENTS = {("allow_pickle", True), ("safe_mode", False), ("weights_only", False)}


def unsafe(source):
    """What in a source could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in UNSAFE_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in UNSAFE_CALLS or name.endswith("enable_unsafe_deserialization") else []
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                found += [f"{keyword.arg}={value}"] if (keyword.arg, value) in UNSAFE_ARGUMENTS else []
    return found


def test_nothing_in_the_package_could_run_code_from_a_file():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 20
    assert {path.name: unsafe(path.read_text(encoding="utf-8")) for path in sources} == {
        path.name: [] for path in sources
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "keras.saving.load_model(path, safe_mode=False)",
        "keras.config.enable_unsafe_deserialization()",
    ],
)
def test_what_could_is_found(source):
    assert unsafe(source)
    assert not unsafe("import json; model.eval(); np.load(path); load_model(path, safe_mode=True)")
