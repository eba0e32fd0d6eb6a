#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine without network:
#
#     bench/on_gpu.sh OUT [--minutes M] [--rehearse]
#
# Builds the package in place with what is there, runs the GPU tests, compute-sanitizer where there is one, measures
# the constants and the benchmarks, what matters most first, and stops cleanly within M minutes (default 9). OUT gets at
# most 8 small files. --rehearse runs every step without a GPU, each as short as it can be. PYTHON names the
# interpreter (default python3). Exit status 0 if every step ended well or was skipped with a reason.
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }

OUT='' MINUTES=9 REHEARSE=''
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) MINUTES=${2:-}; shift 2 || fail "--minutes needs a number" ;;
        --rehearse) REHEARSE=yes; shift ;;
        -*) fail "unknown option $1; usage: bench/on_gpu.sh OUT [--minutes M] [--rehearse]" ;;
        *) [ -z "$OUT" ] || fail "one folder OUT, got $OUT and $1"; OUT=$1; shift ;;
    esac
done
[ -n "$OUT" ] || fail "usage: bench/on_gpu.sh OUT [--minutes M] [--rehearse]"
[[ $MINUTES =~ ^[0-9]+$ ]] && [ "$MINUTES" -ge 1 ] || fail "--minutes needs a whole number >= 1, got '$MINUTES'"
mkdir -p "$OUT" || fail "$OUT: a folder that can be written is needed"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" > /dev/null || fail "$PYTHON is not there: name an interpreter, PYTHON=... bench/on_gpu.sh"
SUMMARY=$OUT/summary.txt LOG=$OUT/log.txt
: > "$SUMMARY"; : > "$LOG"
SPARE=20 # seconds kept for the end
DEADLINE=$((SECONDS + 60 * MINUTES - SPARE))
STATUS=0

left() { echo $((DEADLINE - SECONDS)); }

# say NAME VERDICT
say() { printf '%-12s %s\n' "$1" "$2" | tee -a "$SUMMARY"; }

# step NAME SECONDS COMMAND...: run with a limit, output to the log; the verdict is the last line it printed.
step() {
    local name=$1 limit=$2 started=$SECONDS status verdict
    shift 2
    if [ "$(left)" -lt 10 ]; then say "$name" "not reached: out of time"; return 1; fi
    [ "$limit" -le "$(left)" ] || limit=$(left)
    echo "== $name: $*" >> "$LOG"
    timeout --kill-after=10 "$limit" "$@" > "$OUT/.step" 2>&1
    status=$?
    cat "$OUT/.step" >> "$LOG"
    [ "$name" != bench ] || cp "$OUT/.step" "$OUT/bench.txt"
    verdict=$(grep -v '^[[:space:]]*$' "$OUT/.step" | tail -n 1 | cut -c1-160)
    rm -f "$OUT/.step"
    case $status in
        0) say "$name" "ok, $((SECONDS - started)) s: $verdict" ;;
        124 | 137) say "$name" "FAILED: not done after $limit s"; STATUS=1 ;;
        *) say "$name" "FAILED, status $status: $verdict"; STATUS=1 ;;
    esac
    return $status
}

if [ -n "$REHEARSE" ]; then
    TESTS=(tests/gpu -q -rs) BENCH=(tiny_exact --contender eager --contender backpropagation --quick --device cpu)
else
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch sees no GPU here; --rehearse runs the steps without one"
    TESTS=(tests -m gpu -q -rs) BENCH=(--minutes 0)
fi

# Built in place with what is there; an installation that is this checkout already is left as it is.
in_place() {
    "$PYTHON" - << 'END'
import pathlib, sys
try:
    import pcfast.bench
except ImportError:
    sys.exit(1)
sys.exit(pathlib.Path(pcfast.__file__).resolve().parent.parent != pathlib.Path.cwd())
END
}
if in_place 2> /dev/null; then
    say build "ok: this checkout is installed"
else
    step build 240 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1
fi
"$PYTHON" -m pcfast info --json > "$OUT/info.json" 2>> "$LOG"
"$PYTHON" -m pcfast info > "$OUT/.info" 2>&1 && cat "$OUT/.info" >> "$LOG"
rm -f "$OUT/.info"

step tests 180 "$PYTHON" -m pytest "${TESTS[@]}" -p no:cacheprovider

if [ -n "$REHEARSE" ]; then
    say constants "rehearsed: needs a GPU"
else
    step constants 150 "$PYTHON" -m pcfast.bench.constants.measure --out "$OUT/constants.json"
fi

if [ -n "$REHEARSE" ]; then
    step bench 120 "$PYTHON" -m pcfast bench "${BENCH[@]}" --json "$OUT/bench.json"
else
    # two minutes stay for the sanitizers; the benchmark stops by itself, the step's limit is for what hangs
    minutes=$((($(left) - 120) / 60))
    if [ "$minutes" -ge 1 ]; then
        step bench $((60 * minutes + 90)) "$PYTHON" -m pcfast bench --minutes "$minutes" --json "$OUT/bench.json"
    else
        say bench "not reached: out of time"
    fi
fi

if ! command -v compute-sanitizer > /dev/null; then
    say sanitizer "not run: there is no compute-sanitizer"
elif [ -n "$REHEARSE" ]; then
    say sanitizer "rehearsed: needs a GPU"
else
    for tool in memcheck racecheck synccheck; do
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest tests/gpu -q -x \
            -k "golden or agree" -p no:cacheprovider
    done
fi

echo
[ ! -f "$OUT/bench.txt" ] || cat "$OUT/bench.txt"
echo
cat "$SUMMARY"
exit $STATUS
