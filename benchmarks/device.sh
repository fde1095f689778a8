#!/usr/bin/env bash
# bash benchmarks/device.sh OUT: everything that only a GPU can show, in nine minutes at most, or as many as you give it.
#
# For a machine with torch (CUDA), triton and a driver, but nothing of ours, perhaps no network, and perhaps lent for
# ten minutes at a time. Runs this checkout and leaves two files in OUT: summary.txt, a line for each stage, and
# device.tgz, all logs, CSV and PNG (packed after every stage, so that it is there even if the run is cut off). A stage
# that fails, or takes longer than it may, does not stop the next one; the exit code is 1 if any did.
#
# From the environment:
#   ONLY="tests benchmarks"  only these stages, which then share the time (docs/gpu.md lists the parts)
#   WITHIN=540               seconds for all of it
#   WHEELS=FOLDER            wheels of what the machine lacks: peers, pytest
#   PYTHON=python3           the Python that has torch
#   MR1FAST_COMMIT=...       the commit for the CSV's rows, where the tree is a copy
#   TUNE="loss 16-bit"       what the stage `tune`, which runs only where ONLY names it, may change (all, if empty)
#   DRY_RUN=1                without a GPU: every stage as far as a CPU can take it, on tiny shapes
# Without a GPU, and without DRY_RUN: says so, runs the compile checks, and exits 0 if they pass.
set -u
if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/device.sh OUT" >&2
    exit 2
fi
HERE=$(cd "$(dirname "$0")" && pwd) || exit
. "$HERE/stages.sh"
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

if no_gpu=$(cd "$HERE/.." && "$PYTHON" -c 'import torch
torch.cuda.is_available() or exit("torch.cuda.is_available() is false")' 2>&1); then
    no_gpu=""
else
    no_gpu=$(tail -n 1 <<< "$no_gpu")
fi
if [ -n "$no_gpu" ] && [ -z "${DRY_RUN:-}" ]; then
    hint=" (there is no GPU here; DRY_RUN=1 rehearses the stages for one)"
    plan 540 setup=180 compile_check=200 compile_check_cuda=160
    open_results "$1"
    cd "$HERE/.."
    say "no GPU here ($no_gpu): nothing is measured; the compile checks follow (DRY_RUN=1 rehearses the stages instead)"
    if "$PYTHON" -c 'import torch, triton' 2> /dev/null; then
        skip setup "$PYTHON has torch and triton"
    else
        stage setup make setup
        PYTHON=.venv/bin/python
    fi
    unset TRITON_INTERPRET
    stage compile_check "$PYTHON" -m benchmarks.compile_check
    if "$PYTHON" -c 'import sys; from mr1fast.kernels.cuda_build import find_nvcc; sys.exit(not find_nvcc())'; then
        stage compile_check_cuda "$PYTHON" -m benchmarks.compile_check_cuda
    else
        skip compile_check_cuda "there is no nvcc"
    fi
    finish
fi

# What matters most comes first.
plan "${WITHIN:-540}" +machine=20 +environment=25 cuda_check=45 benchmarks=80 tests=70 linear=70 step=80 shapes=40 \
    memcheck=35 train=25 racecheck=30 dram_bytes=20 -tune=300
open_results "$1"
cd "$HERE/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # not installed: the extension that this would build is for the CPU

if [ ! -e .git ] && [ -z "${MR1FAST_COMMIT:-}" ]; then
    say "the rows of the CSV files will name no commit: there is no .git here, and MR1FAST_COMMIT is not set"
fi
if [ -n "$no_gpu" ]; then
    say "a rehearsal without a GPU ($no_gpu): nothing here is a measurement"
    whole=1080 # others may use the CPU, too
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    quick=(--quick)
    step=(--quick)
    at_once=()
    few=(--device cpu --max-steps 1 --warmup-steps 0 --eval-samples 2)
    check=(-c 'from mr1fast.kernels import cuda_check
cuda_check.VOCABULARIES = (37,)
cuda_check.check("cpu", "triton")')
    linear=(--quick --filter "4 x 16 x 512")
    skip racecheck "without its tool it would be memcheck again"
    skip dram_bytes "there is nothing to count"
    skip tune "there is nothing to measure"
else
    unset TRITON_INTERPRET
    quick=(--seconds 0.3)
    step=(--device cuda --seconds 0.3)
    at_once=(-n 12) # most of their time is compilation
    "$PYTHON" -c 'import xdist' 2> /dev/null || at_once=()
    few=(--device cuda --max-steps 10 --warmup-steps 2 --eval-samples 16)
    check=(-m mr1fast.kernels.cuda_check)
    linear=(--seconds 0.3 --device cuda)
fi

stage machine bash -c "command -v nvidia-smi && nvidia-smi; '$PYTHON' -c 'import sys, torch, triton
from benchmarks import report
print(sys.version, torch.__version__, torch.version.cuda, triton.__version__, \"commit\", report.commit())
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else \"no GPU\")'"

# The machine's own Python stays as it is: an environment on top of it takes the WHEELS and sees its packages (through a
# .pth file, since it may be an environment itself), pip among them; only where it has none, venv needs ensurepip.
if [ -n "${WHEELS:-}" ]; then
    stage environment bash -ec '
        without=$("$1" -c "import pip" 2> /dev/null && echo --without-pip)
        "$1" -m venv $without "$2"
        "$1" -c "import site, sysconfig
print(sysconfig.get_path(\"purelib\"), sysconfig.get_path(\"platlib\"), *site.getsitepackages(), sep=chr(10))" \
            > "$(echo "$2"/lib/python3*/site-packages)/machine.pth"
        "$2/bin/python" -c "import pip, torch, triton"
        "$2/bin/python" -m pip install --no-index --no-deps "$3"/*.whl' environment "$PYTHON" "$SCRATCH/venv" "$WHEELS"
    PYTHON=$SCRATCH/venv/bin/python
else
    skip environment "WHEELS names no folder"
fi

# sanitizer TOOL: after a run without it, which fills the caches of what is compiled at first use. torch's allocator
# hands out pieces of large blocks, within which memcheck sees nothing amiss.
sanitizer() {
    if [ -n "$no_gpu" ]; then
        stage "$1" "$PYTHON" -m benchmarks.sanitized # without the tool
    elif command -v compute-sanitizer > /dev/null; then
        stage "$1" bash -ec '"$1" -m benchmarks.sanitized
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 exec compute-sanitizer --tool "$0" --error-exitcode 9 \
                "$1" -m benchmarks.sanitized' "$1" "$PYTHON"
    else
        skip "$1" "compute-sanitizer is not installed"
    fi
}

stage cuda_check "$PYTHON" "${check[@]}"
stage benchmarks "$PYTHON" -m benchmarks.run gpu "${quick[@]}" --csv "$RESULTS/gpu.csv" --plot "$RESULTS/gpu.png"
stage tests env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q "${at_once[@]}" -p no:cacheprovider -p benchmarks.print_failures \
    tests/test_gpu.py tests/test_gpu_model.py
stage linear "$PYTHON" -m benchmarks.run linear "${linear[@]}" --csv "$RESULTS/linear.csv" --plot "$RESULTS/linear.png"
# A rehearsal trains without Triton's interpreter, in which it would take minutes.
# In a process each: on a card of 80 GB there is no room for a second trainer of 2B beside the first.
stage step env -u TRITON_INTERPRET bash -ec 'results=$0; for of in "mr1fast trainer" "trl GRPOTrainer" GRPODTrainer; do
        "$@" --alone --filter "equal $of" --csv "$results/step ${of##* }.csv"
    done' "$RESULTS" "$PYTHON" -m benchmarks.run step "${step[@]}"
stage shapes "$PYTHON" -m benchmarks.run shapes "${quick[@]}" --csv "$RESULTS/shapes.csv" --plot "$RESULTS/shapes.png"
sanitizer memcheck
stage train env -u TRITON_INTERPRET "$PYTHON" -m mr1fast.train --task vc "${few[@]}" --eval-steps 0 \
    --output-dir "$RESULTS/run"
sanitizer racecheck
if command -v ncu > /dev/null; then
    stage dram_bytes bash -ec '"$0" -m benchmarks.sanitized
        exec ncu --clock-control none --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
            --kernel-name "regex:cluster_fwd|rows_fwd|grpo_loss_fwd|score_fwd" \
            "$0" -m benchmarks.sanitized --large' "$PYTHON"
else
    skip dram_bytes "ncu is not installed"
fi
stage tune "$PYTHON" -m benchmarks.tune --filter "${TUNE:-}" --output "$RESULTS/triton_table.py"
finish
