#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine without network:
#
#     bench/on_gpu.sh OUT [--minutes M] [--only STEP,STEP] [--rehearse]
#
# Builds the package and its CUDA kernels in place with what is there (cmake, ninja and pybind11 among it), runs the
# GPU tests, measures the constants, the kernels alone and whole training steps, what matters most first, then runs
# compute-sanitizer where there is one, and stops cleanly within M minutes (default 9). --only runs some of the steps
# tests, constants, kernels, bench, sanitizer: where one command may not take long enough for all. OUT gets at most 8
# small files. --rehearse runs every step without a GPU, each as short as it can be. PYTHON names the interpreter
# (default python3). Exit status 0 if every step ended well or was skipped with a reason.
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }

USAGE="usage: bench/on_gpu.sh OUT [--minutes M] [--only STEP,STEP] [--rehearse]"
STEPS="tests constants kernels bench sanitizer"
OUT='' MINUTES=9 REHEARSE='' ONLY=${STEPS// /,}
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) MINUTES=${2:-}; shift 2 || fail "--minutes needs a number" ;;
        --only) ONLY=${2:-}; shift 2 || fail "--only needs steps, some of: $STEPS" ;;
        --rehearse) REHEARSE=yes; shift ;;
        -*) fail "unknown option $1; $USAGE" ;;
        *) [ -z "$OUT" ] || fail "one folder OUT, got $OUT and $1"; OUT=$1; shift ;;
    esac
done
[ -n "$OUT" ] || fail "$USAGE"
for name in ${ONLY//,/ }; do
    [[ " $STEPS " == *" $name "* ]] || fail "--only: '$name' is no step; some of: $STEPS"
done
[[ $MINUTES =~ ^[0-9]+$ ]] && [ "$MINUTES" -ge 1 ] || fail "--minutes needs a whole number >= 1, got '$MINUTES'"
mkdir -p "$OUT" || fail "$OUT: a folder that can be written is needed"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" > /dev/null || fail "$PYTHON is not there: name an interpreter, PYTHON=... bench/on_gpu.sh"
SUMMARY=$OUT/summary.txt LOG=$OUT/log.txt
: > "$SUMMARY"; : > "$LOG"
SPARE=20 # seconds kept for the end
SANITIZED="one_step_agrees or states_agree" # tests of tests/gpu that the sanitizers run
DEADLINE=$((SECONDS + 60 * MINUTES - SPARE))
STATUS=0

left() { echo $((DEADLINE - SECONDS)); }

# wanted STEP: whether --only names it
wanted() { [[ ",$ONLY," == *",$1,"* ]]; }

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
    case $name in bench | kernels) cp "$OUT/.step" "$OUT/$name.txt" ;; esac
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
    # the kernels are interpreted, or compiled for the CPU, on sizes that say nothing of their speed
    KERNELS=(--quick --precision ieee --precision bf16 --device cpu)
else
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch sees no GPU here; --rehearse runs the steps without one"
    TESTS=(tests/gpu -q -rs)
    # compiling kernels takes most of the time, and several processes compile side by side
    "$PYTHON" -c 'import xdist' 2> /dev/null && TESTS+=(-n 4)
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
    step build 240 env PCFAST_NATIVE=0 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation \
        --editable . || exit 1
fi
# Apart: what needs no CUDA kernels is run without them, too. Compiled for this GPU alone, which takes a minute.
if [ -z "$REHEARSE" ]; then
    [ -n "${PCFAST_CUDA_ARCHITECTURES:-}" ] || PCFAST_CUDA_ARCHITECTURES=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(str(major) + str(minor) + "a" * (major >= 9))')
    step native 240 env PCFAST_CUDA_ARCHITECTURES="$PCFAST_CUDA_ARCHITECTURES" "$PYTHON" setup.py build_ext --inplace
fi
"$PYTHON" -m pcfast info --json > "$OUT/info.json" 2>> "$LOG"
"$PYTHON" -m pcfast info > "$OUT/.info" 2>&1 && cat "$OUT/.info" >> "$LOG"
rm -f "$OUT/.info"

# half of the time at most: what is measured comes after
wanted tests && step tests $((30 * MINUTES)) "$PYTHON" -m pytest "${TESTS[@]}" -p no:cacheprovider

if ! wanted constants; then
    :
elif [ -n "$REHEARSE" ]; then
    say constants "rehearsed: needs a GPU"
else
    step constants 150 "$PYTHON" -m pcfast.bench.constants.measure --out "$OUT/constants.json"
fi

# The CUDA kernels compiled for the CPU, where they run without a GPU; for rehearsals.
host_module() {
    local tools missing=''
    [ -z "${PCFAST_CUDA_ON_HOST:-}" ] || return 0
    tools=$("$PYTHON" -c 'import pybind11, sysconfig; print(sysconfig.get_path("scripts"))' 2> /dev/null)
    for name in cmake ninja g++; do PATH=$tools:$PATH command -v "$name" > /dev/null || missing=yes; done
    if [ -z "$tools" ] || [ -n "$missing" ] || [ "$(uname -m)" != x86_64 ]; then
        say host "not rehearsed: the CUDA kernels need cmake, ninja, pybind11, g++ and an x86-64 CPU here"
        return 0
    fi
    step host 120 env PATH="$tools:$PATH" bash -c '
        cmake -G Ninja -S . -B build/host -DPCFAST_HOST=ON -Dpybind11_DIR="$("$0" -m pybind11 --cmakedir)" \
            -DPython_EXECUTABLE="$("$0" -c "import sys; print(sys.executable)")" && cmake --build build/host' "$PYTHON" &&
        for name in "$PWD"/build/host/_native_host*.so; do export PCFAST_CUDA_ON_HOST=$name; done
}

# A process of its own: a kernel that breaks takes the context of its process with it.
if ! wanted kernels; then
    :
elif [ -z "$REHEARSE" ]; then
    # a fifth of the time; all of it where nothing else is wanted
    seconds=$((12 * MINUTES))
    [ "$ONLY" != kernels ] || seconds=$(($(left) - 20))
    step kernels $((seconds + 60)) "$PYTHON" -m pcfast bench --kernels --json "$OUT/kernels.json" \
        --minutes "$(awk "BEGIN { print $seconds / 60 }")"
elif "$PYTHON" -c 'import triton' 2> /dev/null; then
    host_module
    step kernels 120 env TRITON_INTERPRET=1 PYTHONPATH="tests/kernels${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c '
import sys, interpreter
interpreter.repair()
from pcfast.cli import main
sys.exit(main(sys.argv[1:]))' bench --kernels "${KERNELS[@]}" --json "$OUT/kernels.json"
else
    say kernels "not rehearsed: triton is not installed"
fi

if ! wanted bench; then
    :
elif [ -n "$REHEARSE" ]; then
    step bench 120 "$PYTHON" -m pcfast bench "${BENCH[@]}" --json "$OUT/bench.json"
else
    # three minutes stay for the sanitizers, where there is time for both; the benchmark stops by itself, the step's
    # limit is for what hangs
    spared=0
    if wanted sanitizer && [ "$(left)" -ge 360 ]; then spared=180; fi
    minutes=$((($(left) - spared) / 60))
    if [ "$minutes" -ge 1 ]; then
        step bench $((60 * minutes + 90)) "$PYTHON" -m pcfast bench --minutes "$minutes" --json "$OUT/bench.json"
    else
        say bench "not reached: out of time"
    fi
fi

if ! wanted sanitizer; then
    :
elif ! command -v compute-sanitizer > /dev/null; then
    say sanitizer "not run: there is no compute-sanitizer"
elif [ -n "$REHEARSE" ]; then
    say sanitizer "rehearsed: needs a GPU"
else
    # the CUDA kernels first: what triton compiles has less of its own to go wrong
    for tests in resident triton eager; do
        for tool in memcheck racecheck synccheck; do
            if ! compute-sanitizer --help | grep -q "$tool"; then
                say "$tool" "not run: this compute-sanitizer has no $tool"
                continue
            fi
            step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest \
                "tests/gpu/test_${tests}_cuda.py" -q -x -k "$SANITIZED" -p no:cacheprovider
        done
    done
fi

echo
for name in kernels bench; do [ ! -f "$OUT/$name.txt" ] || cat "$OUT/$name.txt"; done
echo
cat "$SUMMARY"
exit $STATUS
