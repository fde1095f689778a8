"""`python -m mr1fast.train`: checks the options, before the seconds that importing torch takes, and runs `loop.run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from mr1fast.errors import UserError
from mr1fast.options.parse import parse_arguments
from mr1fast.options.program import missing_package
from mr1fast.training.run_folder import OpenRun, ResumeError, open_run
from mr1fast.training.stop import Stopped, stop_on_sigterm


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 for a mistake of the user's; 1 if training broke off; 128 + the signal's number after one."""
    started = time.time()
    opened: OpenRun | None = None
    try:
        opened = open_run(parse_arguments(sys.argv[1:] if arguments is None else arguments))
        with stop_on_sigterm():
            from torch import OutOfMemoryError

            from mr1fast.training.loop import run
            from mr1fast.training.trainer import TrainingError

            try:
                run(opened, started)
            except TrainingError as error:
                return _fail(f"error: {error}", 1, opened)
            except OutOfMemoryError:
                advice = "try a larger --gradient-accumulation-steps, or fewer --num-generations or --max-pixels"
                return _fail(f"error: the GPU's memory is too small; {advice}", 1, opened)
    except ResumeError as error:
        return _fail(f"error: {error}", 2, None)
    except ModuleNotFoundError as error:
        return _fail(f"error: {missing_package(error)}", 2, opened)
    except (UserError, OSError) as error:  # OSError: most often a full disk
        return _fail(f"error: {error}", 2, opened)
    except Stopped as stopped:
        return _fail(f"stopped by {stopped}", stopped.exit_code, opened)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130, opened)
    return 0


def _fail(message: str, exit_code: int, opened: OpenRun | None) -> int:
    print(f"\n{message}" if exit_code > 2 else message, file=sys.stderr)
    if opened is not None:
        if opened.folder.config_file.exists():
            print(f"to go on: python -m mr1fast.train --resume {opened.folder.path}", file=sys.stderr)
        elif not any(opened.folder.path.iterdir()):
            opened.folder.path.rmdir()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
