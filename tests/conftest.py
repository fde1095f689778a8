import os
import random
import signal

import pytest
import torch
from hypothesis import settings
from quick_interpreter import speed_up_the_interpreter

# In CI the same examples at every run, so that nobody's change fails by bad luck; elsewhere new ones.
settings.register_profile("ci", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("ci" if os.environ.get("CI") else "search")

if torch.cuda.is_available():
    # Otherwise matrix products refuse to run where memory is poisoned. Must be set before the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Without a GPU the Triton kernels run in Triton's interpreter. Must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    speed_up_the_interpreter()
    # torch.manual_seed notes for every kind of device who called it: a millisecond each time, in a list without end.
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever was drawn before: which tests a process runs, and in which order, differs from time to time."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def signals_as_in_a_terminal():
    """A job in the background ignores SIGINT and SIGHUP, and so would the programs that it starts."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def poisoned_memory():
    """Every torch.empty, in C++ too, comes filled with NaN (the largest integer for integers)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restore_threads):
    """Models as small as those here are slower with more."""
    torch.set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch):
    """The loss from hidden states takes blocks as small as chunk_bytes asks for."""
    from mr1fast.kernels import linear

    blocks = {kind: blocks._replace(min_rows=1) for kind, blocks in linear.BLOCKS.items()}
    monkeypatch.setattr(linear, "BLOCKS", blocks)
    monkeypatch.setattr(linear, "ALIGN_ROWS", 1)


@pytest.fixture
def folder(tmp_path):
    """A folder with the images 0.png to 29.png."""
    from data_files import picture

    for number in range(30):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def broken(folder):
    """data.jsonl: ten rows, of which those with an odd number have an image that breaks only when it is decoded."""
    from data_files import encoded, row, write_jsonl
    from PIL import Image

    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    rows = [row(n) for n in range(10)]
    for number in range(1, 10, 2):
        rows[number]["image"] = f"{number}.jpg"
        (folder / f"{number}.jpg").write_bytes(encoded(noise, "JPEG")[:1500])
    return write_jsonl(folder / "data.jsonl", rows)


@pytest.fixture
def hostile_settings():
    """A user's matplotlibrc that no picture could be drawn with here."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "No Such Font", "savefig.dpi": 1e6}):
        yield


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """Name -> `fault_runs.Variant`, whose run that is left alone is made once."""
    from functools import cache

    from tests.fault_runs import Variant

    return cache(lambda name: Variant(name, tmp_path_factory.mktemp("variant")))
