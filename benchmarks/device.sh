#!/usr/bin/env bash
# bash benchmarks/device.sh OUTDIR: everything that only a GPU can show, in under nine minutes.
#
# For a machine with torch (CUDA), triton and a driver, but nothing of ours and perhaps no network. Installs this
# checkout, runs the GPU tests, compute-sanitizer, the recompilation count, training (the embedded model, then three
# steps of Qwen2-VL-2B with random weights) and the benchmarks. Writes a log per stage, CSV, PNG and a summary into
# OUTDIR. A stage that fails, or takes longer than it may, does not stop the next one; the exit code is 1 if any did.
# Wheels of peers and of pytest, if the machine lacks them: put them into a folder and name it in WHEELS.
# Without a GPU: says so, runs the compile checks, and exits 0 if they pass.
set -u
if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/device.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
PYTHON=${PYTHON:-python3}
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
failed=0

# stage NAME SECONDS COMMAND...: its output goes to NAME.log, one line to the summary.
stage() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "==> $name"
    timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
        0) echo "ok      $((SECONDS - began)) s  $name" ;;
        124 | 137) echo "TIMEOUT $limit s  $name" ;;
        *) echo "FAILED  $((SECONDS - began)) s  $name (exit $status): $(tail -n 1 "$OUT/$name.log")" ;;
    esac | tee -a "$SUMMARY"
    [ $status -eq 0 ] || failed=1
}

skip() {
    echo "skipped      $1: $2" | tee -a "$SUMMARY"
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "no GPU here (torch.cuda.is_available() is false): nothing is measured; the compile checks follow" | tee -a "$SUMMARY"
    stage compile_check 300 "$PYTHON" -m benchmarks.compile_check
    if "$PYTHON" -c 'import sys; from mr1fast.kernels.cuda_build import find_nvcc; sys.exit(not find_nvcc())'; then
        stage compile_check_cuda 300 "$PYTHON" -m benchmarks.compile_check_cuda
    else
        skip compile_check_cuda "there is no nvcc"
    fi
    exit $failed
fi

stage machine 60 bash -c "nvidia-smi; $PYTHON -c 'import sys, torch, triton
print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)
print(torch.cuda.get_device_properties(0))'"

# The machine's own torch and triton stay; what else we need comes from WHEELS, or is there already.
"$PYTHON" -m venv --system-site-packages "$OUT/venv" > /dev/null 2>&1 && PYTHON=$OUT/venv/bin/python
if [ -n "${WHEELS:-}" ]; then
    stage wheels 120 "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
stage install 120 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

stage cuda_check 240 "$PYTHON" -m mr1fast.kernels.cuda_check
if "$PYTHON" -c 'import pytest' 2> /dev/null; then
    stage tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
else
    skip tests "pytest is not installed (WHEELS)"
fi
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitized
    done
else
    skip sanitizer "compute-sanitizer is not installed"
fi
stage specialisations 60 "$PYTHON" -m benchmarks.specialisations
if "$PYTHON" -c 'import transformers' 2> /dev/null; then
    stage train 90 "$PYTHON" -m mr1fast.train --device cuda --max_steps 20 --eval_steps 0 --eval_samples 32 \
        --output_dir "$OUT/run"
    stage qwen2vl_2b 120 "$PYTHON" -m benchmarks.steps_2b --csv "$OUT/qwen2vl_2b.csv"
else
    skip train "transformers is not installed (WHEELS)"
fi
stage benchmarks 150 "$PYTHON" -m benchmarks.run gpu --seconds 0.5 --csv "$OUT/gpu.csv" --plot "$OUT/gpu.png"
if command -v ncu > /dev/null; then
    stage dram_bytes 90 ncu --clock-control none --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        --kernel-name "regex:cluster_fwd|rows_fwd|grpo_loss_fwd|score_fwd" "$PYTHON" -m benchmarks.sanitized --large
else
    skip dram_bytes "ncu is not installed"
fi
rm -rf "$OUT/venv"
echo "all in $OUT; the summary again:"
cat "$SUMMARY"
exit $failed
