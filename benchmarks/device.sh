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
ENOUGH=530 # seconds for everything; what would begin later is skipped
failed=0

# stage NAME SECONDS COMMAND...: its output goes to NAME.log, one line to the summary.
stage() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    if [ "$limit" -gt $((ENOUGH - SECONDS)) ]; then
        limit=$((ENOUGH - SECONDS))
    fi
    if [ "$limit" -lt 10 ]; then
        skip "$name" "the nine minutes are over"
        failed=1
        return
    fi
    echo "==> $name"
    timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    case $status in
        0) echo "ok      $((SECONDS - began)) s  $name" ;;
        124 | 137) echo "TIMEOUT $limit s  $name" ;;
        *) echo "FAILED  $((SECONDS - began)) s  $name (exit $status): $(tail -n 1 "$OUT/$name.log" | cut -c 1-160)" ;;
    esac | tee -a "$SUMMARY"
    [ $status -eq 0 ] || failed=1
}

skip() {
    echo "skipped      $1: $2" | tee -a "$SUMMARY"
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "no GPU here (torch.cuda.is_available() is false): nothing is measured; the compile checks follow" | tee -a "$SUMMARY"
    if ! "$PYTHON" -c 'import torch, triton' 2> /dev/null; then
        stage setup 300 make setup
        PYTHON=.venv/bin/python
    fi
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

# The machine's own Python stays as it is: an environment on top of it sees its packages (through a .pth file, since it
# may be an environment itself) and takes ours and those of WHEELS.
MACHINE=$PYTHON
PYTHON=$OUT/venv/bin/python
stage environment 60 bash -c "'$MACHINE' -m venv '$OUT/venv' && '$MACHINE' -c 'import site, sysconfig
print(sysconfig.get_path(\"purelib\"))
print(sysconfig.get_path(\"platlib\"))
print(*site.getsitepackages(), sep=chr(10))' > \"\$('$PYTHON' -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')/machine.pth\"
'$PYTHON' -c 'import torch, triton'"
if [ -n "${WHEELS:-}" ]; then
    stage wheels 60 "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
stage install 120 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

has() {
    "$PYTHON" -c "import $1" 2> /dev/null
}

stage cuda_check 120 "$PYTHON" -m mr1fast.kernels.cuda_check
if has pytest; then
    stage tests 180 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
else
    skip tests "pytest is not installed (WHEELS)"
fi
if has transformers; then
    stage train 60 "$PYTHON" -m mr1fast.train --task vc --device cuda --max-steps 10 --eval-steps 0 --eval-samples 16 \
        --output-dir "$OUT/run"
    stage qwen2vl_2b 90 "$PYTHON" -m benchmarks.steps_2b --csv "$OUT/qwen2vl_2b.csv"
else
    skip train "transformers is not installed (WHEELS)"
    skip qwen2vl_2b "transformers is not installed (WHEELS)"
fi
stage benchmarks 120 "$PYTHON" -m benchmarks.run gpu --seconds 0.3 --csv "$OUT/gpu.csv" --plot "$OUT/gpu.png"
stage linear 100 "$PYTHON" -m benchmarks.run linear --device cuda --seconds 0.3 --csv "$OUT/linear.csv" \
    --plot "$OUT/linear.png"
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitized
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
done
if command -v ncu > /dev/null; then
    stage dram_bytes 60 ncu --clock-control none \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        --kernel-name "regex:cluster_fwd|rows_fwd|grpo_loss_fwd|score_fwd" "$PYTHON" -m benchmarks.sanitized --large
else
    skip dram_bytes "ncu is not installed"
fi
stage specialisations 60 "$PYTHON" -m benchmarks.specialisations
rm -rf "$OUT/venv"
echo "after $SECONDS s, all in $OUT; the summary again:"
cat "$SUMMARY"
exit $failed
