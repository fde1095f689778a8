#!/usr/bin/env bash
# bash benchmarks/device.sh OUTDIR: everything that only a GPU can show, in under nine minutes.
#
# For a machine with torch (CUDA), triton and a driver, but nothing of ours and perhaps no network. Runs this checkout:
# the check of the CUDA kernels, the GPU tests, the benchmarks from logits and from hidden states, three steps of
# Qwen2-VL-2B's shape with random weights, compute-sanitizer, training of the embedded model, and ncu's bytes. Writes a
# log per stage, CSV, PNG and a summary into OUTDIR. A stage that fails, or takes longer than it may, does not stop the
# next one; the exit code is 1 if any did, or if the time did not suffice for all.
# Wheels of peers, pytest and what else the machine lacks: put them into a folder and name it in WHEELS.
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

stage machine 40 bash -c "nvidia-smi; $PYTHON -c 'import sys, torch, triton
print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)
print(torch.cuda.get_device_properties(0))'"

# The machine's own Python stays as it is: an environment on top of it takes the WHEELS and sees its packages (through a
# .pth file, since it may be an environment itself), pip among them; only where it has none, venv needs ensurepip.
if [ -n "${WHEELS:-}" ]; then
    MACHINE=$PYTHON
    PYTHON=$OUT/venv/bin/python
    without=$("$MACHINE" -c 'import pip' 2> /dev/null && echo --without-pip)
    stage environment 30 bash -c "'$MACHINE' -m venv $without '$OUT/venv' && '$MACHINE' -c 'import site, sysconfig
print(sysconfig.get_path(\"purelib\"), sysconfig.get_path(\"platlib\"), *site.getsitepackages(), sep=chr(10))' \
> '$OUT/machine.pth' && mv '$OUT/machine.pth' '$OUT'/venv/lib/python3*/site-packages &&
'$PYTHON' -c 'import pip, torch, triton'"
    stage wheels 40 "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
# Not installed: the extension that this would build is for the CPU.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# can NAME MODULES: whether the stage can import what it runs. Where a package is missing it is skipped, and says which;
# any other error is for the stage to show.
can() {
    local said
    said=$("$PYTHON" -c "import $2" 2>&1 | tail -n 1)
    [[ $said == *ModuleNotFoundError* && $said != *mr1fast* ]] || return 0
    skip "$1" "$said (put its wheel into WHEELS)"
    return 1
}

# What matters most comes first; up to the linear figures, the seconds add up to what there is.
stage cuda_check 80 "$PYTHON" -m mr1fast.kernels.cuda_check
if can tests pytest; then
    stage tests 130 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
fi
stage benchmarks 120 "$PYTHON" -m benchmarks.run gpu --seconds 0.3 --csv "$OUT/gpu.csv" --plot "$OUT/gpu.png"
stage linear 90 "$PYTHON" -m benchmarks.run linear --device cuda --seconds 0.3 --csv "$OUT/linear.csv" \
    --plot "$OUT/linear.png"
if can qwen2vl_2b benchmarks.steps_2b; then
    stage qwen2vl_2b 90 "$PYTHON" -m benchmarks.steps_2b --csv "$OUT/qwen2vl_2b.csv"
fi
# torch's allocator hands out pieces of large blocks, within which memcheck sees nothing amiss.
sanitizer() {
    if command -v compute-sanitizer > /dev/null; then
        stage "$1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitized
    else
        skip "$1" "compute-sanitizer is not installed"
    fi
}
sanitizer memcheck
if can train "mr1fast.training.loop, matplotlib, torch.utils.tensorboard"; then
    stage train 60 "$PYTHON" -m mr1fast.train --task vc --device cuda --max-steps 10 --eval-steps 0 --eval-samples 16 \
        --output-dir "$OUT/run"
fi
sanitizer racecheck
if command -v ncu > /dev/null; then
    stage dram_bytes 60 ncu --clock-control none \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        --kernel-name "regex:cluster_fwd|rows_fwd|grpo_loss_fwd|score_fwd" "$PYTHON" -m benchmarks.sanitized --large
else
    skip dram_bytes "ncu is not installed"
fi
rm -rf "$OUT/venv"
echo "after $SECONDS s, all in $OUT; the summary again:"
cat "$SUMMARY"
exit $failed
