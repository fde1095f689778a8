# Sourced by device.sh: stages under time limits, whose results come back as two files, summary.txt and device.tgz.
#
#   plan SECONDS NAME=SECONDS...  how long all may take, what there is to run, and how long each may take
#   open_results OUT              a folder for results, which from now on are packed into OUT/device.tgz
#   stage NAME COMMAND...         runs it under its limit, if it was chosen; its output goes to NAME.log
#   skip NAME WHY                 leaves it out, and says so
#   finish                        exit code 1 if a stage failed or was cut off
#
# ONLY="NAME NAME" in the environment chooses stages. A plan's limits add up to the whole. They are shares of the time
# left: what a stage leaves, or one that was not chosen, goes to the others, and all together stay within the whole.
# A stage named +NAME runs also where ONLY does not choose it, one named -NAME only where ONLY does.

declare -A share=() pending=()
failed=0
child=""    # process of the stage that is running: `timeout`, which leads a process group of its own
running=""  # its name

plan() {
    whole=$1
    shift
    local entry name known=()
    for entry; do
        name=${entry#[+-]}
        share[${name%=*}]=${name#*=}
        known+=("${name%=*}")
        if [[ $entry == +* || ($entry != -* && -z ${ONLY:-}) ]]; then
            pending[${name%=*}]=1
        fi
    done
    for name in ${ONLY:-}; do
        if [ -z "${share[$name]:-}" ]; then
            echo "${0##*/}: ONLY names no stage that there is: '$name'; there are ${known[*]}${hint:-}" >&2
            exit 2
        fi
        pending[$name]=1
    done
}

chosen() {
    [ -n "${pending[$1]:-}" ]
}

open_results() {
    if [ -e "$1/device.tgz" ] || [ -e "$1/device" ]; then
        echo "${0##*/}: $1 holds the results of an earlier run; name another folder" >&2
        exit 2
    fi
    mkdir -p "$1/device" || exit 2
    OUT=$(cd "$1" && pwd)
    RESULTS=$OUT/device
    SCRATCH=$(mktemp -d)
    : > "$OUT/summary.txt"
    trap close_results EXIT
    trap 'cut_off INT 130' INT
    trap 'cut_off TERM 143' TERM
    trap 'cut_off HUP 129' HUP
    trap : PIPE # whoever reads our output may be gone before us
}

say() {
    echo "$*" >> "$OUT/summary.txt"
    echo "$*"
}

stage() {
    local name=$1 began=$SECONDS limit status
    shift
    chosen "$name" || return 0
    limit=$(allowance "$name")
    if [ "$limit" -lt 1 ]; then
        skip "$name" "the $whole s are over"
        failed=1
        return
    fi
    unset "pending[$name]"
    echo "==> $name, at most $limit s"
    running=$name
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$RESULTS/$name.log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=""
    report "$name" $status $((SECONDS - began)) "$limit"
    pack
}

# report NAME STATUS SECONDS LIMIT: the stage's line in the summary. A package that is missing is no failure.
report() {
    local last
    last=$(tail -n 1 "$RESULTS/$1.log" | cut -c 1-160)
    if [ "$2" -eq 0 ]; then
        say "ok       $3 s  $1"
    elif [[ $last == *"No module named "* && $last != *mr1fast* && $last != *benchmarks* ]]; then
        say "skipped  $1: $last (put its wheel into WHEELS)"
    else
        failed=1
        case $2 in
            124 | 137) say "TIMEOUT  $4 s  $1: $last" ;;
            *) say "FAILED   $3 s  $1 (exit $2): $last" ;;
        esac
    fi
}

# Seconds: the share of the time left that the stage has among those that have not run.
allowance() {
    local name among=0
    for name in "${!pending[@]}"; do
        among=$((among + share[$name]))
    done
    echo $(((whole - SECONDS) * share[$1] / among))
}

skip() {
    chosen "$1" || return 0
    unset "pending[$1]"
    say "skipped  $1: $2"
}

# After every stage, so that the archive is there whatever happens next. Without the weights of a training run, since
# some machines hand back small files only. tar's exit code 1: a file grew meanwhile.
pack() {
    tar -czf "$SCRATCH/device.tgz" --exclude='*.safetensors' --exclude='*.pt' -C "$OUT" device summary.txt
    [ $? -le 1 ] && mv -f "$SCRATCH/device.tgz" "$OUT/device.tgz"
}

cut_off() {
    trap '' INT TERM HUP
    say "CUT OFF by SIG$1 in ${running:-the beginning}; not begun: ${!pending[*]}"
    pack # there may be no time for more
    if [ -n "$child" ]; then
        kill -INT "$child" 2> /dev/null
        local tenth
        for tenth in {1..40}; do
            kill -0 "$child" 2> /dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$child" 2> /dev/null
    fi
    exit "$2"
}

close_results() {
    pack && rm -rf "$RESULTS"
    rm -rf "$SCRATCH"
}

finish() {
    echo "after $SECONDS s, all of it in $OUT/device.tgz; the summary again:"
    cat "$OUT/summary.txt"
    exit $failed
}
