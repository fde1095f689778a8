"""`python -m mr1fast.train`: checks the options before torch is imported, which takes seconds, and runs `loop.run`."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.parse import parse_arguments, printed_config
from mr1fast.options.program import missing_package
from mr1fast.training.open_run import OpenRun, how_to_continue, open_run, requested_config
from mr1fast.training.processes import PeerFailed, one_voice, started
from mr1fast.training.run_folder import ResumeError
from mr1fast.training.stop import Stopped, is_out_of_memory, stop_on_sigterm, too_little_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 for a mistake of the user's; 1 if training failed; 128 + its number after a signal."""
    began = time.monotonic()
    error: UserError | OSError | None = None
    config: TrainConfig | None = None
    engine = None
    with one_voice():
        try:
            request = parse_arguments(sys.argv[1:] if arguments is None else arguments)
            if request.print_config:
                print(printed_config(requested_config(request)), end="")
                return 0
            if request.plan is not None:
                return _plan(requested_config(request), request.plan or None)
            config = requested_config(request)
            engine = _engine(config)
        except (UserError, OSError) as wrong:
            error = wrong
        except KeyboardInterrupt:
            return _fail("stopped by Ctrl-C", 130)
        try:
            with started(error, str(config)) as processes, open_run(request, processes) as opened:
                return _train(opened, began, engine)
        except (UserError, OSError) as wrong:
            return _fail(f"error: {_reason(wrong)}", 2)
        except PeerFailed as failed:
            return _fail(f"error: {failed}", 1)
        except KeyboardInterrupt:
            return _fail("stopped by Ctrl-C", 130)


def _plan(config: TrainConfig, gigabytes: int | None) -> int:
    """1 if a step does not fit."""
    try:
        from mr1fast.training.plan_run import report

        text, fits = report(config, gigabytes)
    except ModuleNotFoundError as error:
        raise UserError(missing_package(error)) from error
    except ValueError as error:  # of device or model, in one sentence
        raise UserError(str(error)) from error
    print(text)
    return 0 if fits else 1


def _engine(config: TrainConfig) -> Any:
    """What trains, if it is not our own loop. Raises UserError where it is not there or cannot do what is asked."""
    if config.engine == "mr1fast":
        return None
    try:
        from mr1fast.integrations import trl_engine
    except ModuleNotFoundError as error:
        raise UserError(f"--engine trl: {missing_package(error, 'integrations')}") from error
    except ImportError as error:  # a version of TRL that we cannot work with
        raise UserError(f"--engine trl: {error}") from error
    trl_engine.check_options(config)
    return trl_engine.train_task


def _train(opened: OpenRun, began: float, engine: Any) -> int:
    """Train. A failure from here on leaves a run that can be resumed, or no folder at all."""
    try:
        with stop_on_sigterm():
            from mr1fast.training.loop import run
            from mr1fast.training.task_run import TrainingError

            try:
                with opened.processes.failing_together():
                    run(opened, began, engine)
            except (TrainingError, PeerFailed) as error:
                return _fail(f"error: {error}", 1, opened)
            except (RuntimeError, MemoryError, UserError) as error:  # UserError: of a file that was read or written
                if not is_out_of_memory(error):
                    raise
                return _fail(f"error: {too_little_memory(opened.config)}", 1, opened)
    except ResumeError as error:
        return _fail(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        return _fail(f"error: {missing_package(error)}", 2, opened)
    except (UserError, OSError) as error:  # OSError: most often a full disk
        return _fail(f"error: {_reason(error, opened)}", 2, opened)
    except Stopped as stopped:
        exit_code = _fail(f"stopped by {stopped}", stopped.exit_code, opened)
        if opened.folder.metrics_file.exists():
            print(f"to draw its curves: python -m mr1fast.plot {opened.folder.path}", file=sys.stderr)
        return exit_code
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130, opened)
    return 0


# What the system says of files; a failing network has other numbers.
_OF_FILES = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOSPC, errno.EROFS, errno.ESTALE}


def _reason(error: UserError | OSError, opened: OpenRun | None = None) -> str:
    """One sentence; of a file that could not be read or written it has the name, or that of its run."""
    if not isinstance(error, OSError) or error.errno not in _OF_FILES:
        return str(error)
    file = error.filename or ("a file" if opened is None else f"a file in {opened.folder.path}")
    return f"{file} could not be read or written: {error.strerror}"


def _fail(message: str, exit_code: int, opened: OpenRun | None = None) -> int:
    print(f"\n{message}" if exit_code > 2 else message, file=sys.stderr)
    if opened is not None:
        opened.processes.report(message)
        if opened.folder.config_file.exists():
            print(how_to_continue(opened.folder), file=sys.stderr)
        elif opened.processes.is_main:
            with suppress(OSError):  # it is not empty, read-only, or not there any more
                opened.folder.remove_leftovers()
                opened.folder.path.rmdir()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
