"""What all tests share: one thread, a fixed seed, a clean Keras session, and no TensorFlow on the other backends."""

import gc
import os
import pathlib
import sys

for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(name, "1")  # suites run side by side, and two threads on a shared core are slower than one
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA compiles much here and runs little, so it need not compile well: without the emitters of fusions it takes JAX half
# the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Half of JAX's time here is XLA compiling what it compiled before, in this run or in an earlier one.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras  # noqa: E402  reads the environment
import pytest  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

# Generated cases are the same in every run, so that a change fails for what it changed, and nothing of them is kept on
# disk. To explain a failure takes a hundred times as long as to find it, so that phase is left out.
phases = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, phases=phases)
settings.load_profile("repeatable")

STATUS = pytest.StashKey()

if keras.backend.backend() != "tensorflow":
    sys.modules["tensorflow"] = None  # makes `import tensorflow` fail: nothing may need it on another backend
if keras.backend.backend() == "torch":
    import torch

    torch.set_num_threads(1)


def pytest_report_header():
    return f"backend: {keras.backend.backend()}"


def pytest_collection_modifyitems(items):
    """What touches no backend, or is another case of what all run, runs once, on PyTorch, whose suite is the shortest.

    The more so as TensorFlow takes 5 to 15 seconds to trace and compile a small model's step.
    """
    if keras.backend.backend() != "torch":
        for item in items:
            if item.get_closest_marker("on_one_backend"):
                item.add_marker(pytest.mark.skip(reason="the suite of PyTorch runs it"))


def pytest_collection_finish():
    """What is imported by now stays, so the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config):
    """On TensorFlow the process ends here, all being said: pytest would collect garbage next, and was seen to hang.

    To free an iterator of tf.data waits for its thread, and where that thread runs Python, it waits for this one.
    """
    if keras.backend.backend() == "tensorflow" and STATUS in config.stash:
        config.get_terminal_writer().flush()
        os._exit(config.stash[STATUS])


@pytest.fixture(autouse=True)
def fresh_session():
    """Every test starts from seed 0 and leaves no names, policies or seeds behind."""
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """After each file JAX lets go of what it compiled: after half of them it held 5 GB in 19,000 maps of memory."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        gc.collect()
        jax.clear_caches()


@pytest.fixture
def weights_go_quickly(monkeypatch):
    """Keras collects garbage whenever a layer loses a weight, a dozen times to quantize a model.

    Late in a suite, with all that TensorFlow has made by then, each took seconds.
    """
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
