"""The command `mr1fast`, and `mr1fast env`."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mr1fast import __main__ as command
from mr1fast import __version__, env
from mr1fast.kernels import dispatch
from mr1fast.options import program


@pytest.fixture(autouse=True)
def arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # the command sets them for the program


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments, capsys):
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: mr1fast COMMAND ..."
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(command.COMMANDS)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("trian", "train"), ("eval", "evaluate"), ("Plot", "plot"), ("nonsense", None)]
)
def test_an_unknown_command_is_one_sentence(name, suggestion, capsys):
    assert command.main([name, "--help"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: the command must be one of {', '.join(command.COMMANDS)}, got {name!r}")
    assert errors.count("\n") == 1
    assert ("did you mean" in errors) == (suggestion is not None)
    assert suggestion is None or f"(did you mean {suggestion!r}?)" in errors


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_program_calls_itself_as_it_was_called(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mr1fast {name} [-h]")
    module, _ = command.COMMANDS[name]
    sys.argv = ["a script", "--help"]
    with pytest.raises(SystemExit):
        sys.modules[module].main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {module} [-h]")


def test_arguments_and_exit_code_are_the_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", "--lerning-rate", "1"], ["plot", "missing"], ["env", "--json"], ["evaluate"]):
        assert command.main(arguments) == 2
        output, errors = capsys.readouterr()
        assert (output, errors.count("\n")) == ("", 1)
        assert errors.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checkout", [True, False])
def test_a_missing_package_comes_with_the_command_that_brings_it(checkout, monkeypatch, capsys):
    monkeypatch.setattr(program, "IS_CHECKOUT", checkout)
    monkeypatch.setattr(command.importlib, "import_module", lambda name: __import__("no_such_package"))
    assert command.main(["plot"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    advice = "'make setup', then" if checkout else f"""'{sys.executable} -m pip install "mr1fast[train]"'"""
    assert line.startswith(f"error: the package 'no_such_package' is not installed for {sys.executable}; run {advice}")


# ---- mr1fast env ----------------------------------------------------------------------------------------------------


def section(text, title):
    """The rows of a section of the report, as a dict."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test_env_says_of_each_backend_what_the_dispatcher_says(capsys):
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"mr1fast       {__version__}, ")
    assert section(text, "packages")["torch"] == torch.__version__
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows, logits = section(text, f"backends on {device}"), torch.zeros(1, 1, 8, device=device)
        assert list(rows) == [*(backend.name for backend in dispatch.BACKENDS), "torch", "auto"]
        for backend in dispatch.BACKENDS:
            reason, row = backend.why_not(logits), rows[backend.name]
            assert row.startswith("runs") if reason is None else row == f"does not run: {reason}"
        assert rows["auto"] == f"takes {dispatch.resolve('auto', logits)}"
    assert torch.cuda.is_available() or "backends on cuda: there is no CUDA device" in text


def test_env_names_each_gpu(monkeypatch):
    gpus = [SimpleNamespace(name=f"GPU {n}", major=9, minor=n, total_memory=80 * 2**30) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    rows = dict(env.devices())
    assert rows["cuda:0"] == "GPU 0, compute capability 9.0, 80 GiB"
    assert rows["cuda:1"] == "GPU 1, compute capability 9.1, 80 GiB"


def test_env_reports_what_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such"))
    monkeypatch.setitem(sys.modules, "torch", None)  # "import torch" raises
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert section(text, "packages")["no-such"] == "not installed"
    assert text.splitlines()[-1].startswith("this report ends early: ModuleNotFoundError: import of torch halted")


def test_python_m_mr1fast():
    """The whole way, in a process of its own, with a processor that MR1FAST_CPU asks for in vain."""
    done = subprocess.run(
        [sys.executable, "-m", "mr1fast", "env"],
        capture_output=True,
        text=True,
        env=os.environ | {"MR1FAST_CPU": "mmx", "TRITON_INTERPRET": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    (settings,) = [line.split() for line in done.stdout.splitlines() if line.startswith("environment ")]
    assert {"MR1FAST_CPU=mmx", "TRITON_INTERPRET=1"} <= set(settings)
    rows = section(done.stdout, "backends on cpu")
    assert rows["cpp"].startswith("does not run: MR1FAST_CPU must be one of")
    assert rows["triton"] == "runs"
