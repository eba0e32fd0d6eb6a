#!/usr/bin/env bash
# Everything that needs a GPU on a machine without network, in two calls of 7 minutes each:
#
#     bench/on_gpu.sh OUT --part 1    # builds; pcfast qualify; the assumptions that no CPU can test; the GPU tests
#     bench/on_gpu.sh OUT --part 2    # constants, kernels alone, whole training steps; compute-sanitizer if time is left
#
# Builds the package and its CUDA kernels in place with what is there (cmake, ninja and pybind11 among it), runs what
# matters most first, and stops cleanly within --minutes M (default 7, 14 without --part); a step whose time runs out
# leaves its tracebacks and what it has measured. --only STEP,STEP runs some of the steps qualify, probes, tests, large,
# constants, kernels, bench, sanitizer. OUT gets at most 8 small files, the qualification in info.json. --rehearse runs every step without a GPU, each
# as short as it can be. PYTHON names the interpreter (default python3). Exit status 0 if every step ended well or was
# skipped with a reason.
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }

USAGE="usage: bench/on_gpu.sh OUT [--part 1|2] [--minutes M] [--only STEP,STEP] [--rehearse]"
PART_1=qualify,probes,tests,large PART_2=constants,kernels,bench,sanitizer
STEPS="$PART_1,$PART_2"
OUT='' MINUTES='' REHEARSE='' ONLY='' PART=''
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) MINUTES=${2:-}; shift 2 || fail "--minutes needs a number" ;;
        --only) ONLY=${2:-}; shift 2 || fail "--only needs steps, some of: $STEPS" ;;
        --part) PART=${2:-}; shift 2 || fail "--part needs a number, 1 or 2" ;;
        --rehearse) REHEARSE=yes; shift ;;
        -*) fail "unknown option $1; $USAGE" ;;
        *) [ -z "$OUT" ] || fail "one folder OUT, got $OUT and $1"; OUT=$1; shift ;;
    esac
done
[ -n "$OUT" ] || fail "$USAGE"
[ -z "$PART" ] || [ -z "$ONLY" ] || fail "--part $PART with --only $ONLY: one of the two"
case $PART in
    '') ONLY=${ONLY:-$STEPS} MINUTES=${MINUTES:-14} ;;
    1) ONLY=$PART_1 MINUTES=${MINUTES:-7} ;;
    2) ONLY=$PART_2 MINUTES=${MINUTES:-7} ;;
    *) fail "--part needs 1 or 2, got '$PART'" ;;
esac
for name in ${ONLY//,/ }; do
    [[ ",$STEPS," == *",$name,"* ]] || fail "--only: '$name' is no step; some of: $STEPS"
done
[[ $MINUTES =~ ^[0-9]+$ ]] && [ "$MINUTES" -ge 1 ] || fail "--minutes needs a whole number >= 1, got '$MINUTES'"
mkdir -p "$OUT" || fail "$OUT: a folder that can be written is needed"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" > /dev/null || fail "$PYTHON is not there: name an interpreter, PYTHON=... bench/on_gpu.sh"
SUMMARY=$OUT/summary.txt LOG=$OUT/log.txt
: > "$SUMMARY"; : > "$LOG"
TABLES=$(mktemp -d) || fail "no temporary folder can be made"
trap 'rm -rf "$TABLES"' EXIT
SAID=$TABLES/said
SPARE=30 # seconds kept for the end, and for a step that does not stop when its time is up
DEADLINE=$((SECONDS + 60 * MINUTES - SPARE))
STATUS=0
source bench/steps.sh

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PCFAST_TRACEBACK=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # or jax takes three quarters of the GPU at its first use

# wanted STEP: whether it is one of this call's
wanted() { [[ ",$ONLY," == *",$1,"* ]]; }

# for_minutes SECONDS: as options of pcfast want them
for_minutes() { awk "BEGIN { printf \"%.2f\", $1 / 60 }"; }

# keep NAME: the last step's output, for the end
keep() { [ ! -f "$SAID" ] || cp "$SAID" "$TABLES/$1.txt"; }

# pytest-benchmark warns beside xdist, which is an error here. A test that hangs says where after 90 s.
PYTEST=(-m pytest -v --tb=short -rs -p no:cacheprovider -p no:benchmark -o faulthandler_timeout=90)
ALONE=("${PYTEST[@]}") # in one process
if [ -z "$REHEARSE" ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch sees no GPU here; --rehearse runs the steps without one"
    # compiling kernels takes most of the time, and several processes compile side by side
    if "$PYTHON" -c 'import xdist' 2> /dev/null; then PYTEST+=(-n "$(at_most 12 "$(nproc)")"); fi
fi
# Names of tests of tests/gpu: tiles of other sizes sum alike; threads capture side by side; cuDNN's deterministic
# algorithms in every precision; inputs at odd addresses. The probes run them first, the tests leave them out then.
PROBED="where_tiles_grow or threads_do_not_disturb or cifar_cnn or padded_cnn or mnist_cnn or inputs_that_are_views"
KERNELS=(tests/gpu/test_kernels_cuda.py tests/gpu/test_resident_cuda.py tests/gpu/test_triton_cuda.py)
LARGE="two_to_the_31" # needs most of the GPU's memory
SANITIZED="states_agree" # what the sanitizers run of test_resident_cuda.py

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
    step build 120 env PCFAST_NATIVE=0 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation \
        --editable . || exit 1
fi
# Apart: what needs no CUDA kernels is run without them, too. Compiled for this GPU alone, which takes a minute.
if [ -z "$REHEARSE" ]; then
    [ -n "${PCFAST_CUDA_ARCHITECTURES:-}" ] || PCFAST_CUDA_ARCHITECTURES=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(str(major) + str(minor) + "a" * (major >= 9))')
    step native 180 env PCFAST_CUDA_ARCHITECTURES="$PCFAST_CUDA_ARCHITECTURES" "$PYTHON" setup.py build_ext --inplace
fi
if ! wanted qualify; then
    :
elif [ -n "$REHEARSE" ]; then
    say qualify "rehearsed: needs a GPU"
else
    # each kind of kernels in child processes: what breaks here breaks nothing else
    step qualify 130 "$PYTHON" -m pcfast qualify --limit 110
fi
step info 60 bash -c '"$0" -m pcfast info --json > "$1"; status=$?; cat "$1"; exit $status' "$PYTHON" "$OUT/info.json"

if wanted probes; then
    step tools 20 bash -c '
        for tool in nvcc gcc compute-sanitizer nvidia-smi; do command -v "$tool" || echo "no $tool"; done
        nvidia-smi
        "$0" -m pip list | grep -i -E "pytest|benchmark|xdist|timeout|torch|triton|numpy|jax"; true' "$PYTHON"
    if [ -n "$REHEARSE" ]; then
        say probes "rehearsed: they need a GPU"
    else
        # each kernel once, judged against float64
        step launches "$(at_most 75 $((12 * MINUTES)))" "$PYTHON" -m pcfast bench --kernels --quick --minutes 0.6 \
            --json "$OUT/probes.json"
        step eager 75 env OMP_NUM_THREADS=1 "$PYTHON" "${ALONE[@]}" tests/gpu/test_eager_cuda.py
        step probed 75 env OMP_NUM_THREADS=1 "$PYTHON" "${PYTEST[@]}" "${KERNELS[@]}" -k "($PROBED) and not $LARGE"
        step jax 30 "$PYTHON" -c '
import importlib.util, torch
torch.ones(1).cuda()
if importlib.util.find_spec("jax") is None:
    print("jax is not installed")
else:
    import jax
    print("jax runs on", jax.default_backend())'
    fi
fi

if wanted tests; then
    kept=0 rest="not $LARGE" files=(tests/gpu)
    if wanted large && [ "$(left)" -ge 150 ]; then kept=70; fi
    if wanted probes && [ -z "$REHEARSE" ]; then
        files=("${KERNELS[@]}")
        rest="not ($PROBED or $LARGE)"
    fi
    # what is measured comes after, where it is wanted
    limit=$(($(left) - kept))
    if wanted kernels || wanted bench; then limit=$(at_most "$limit" $((25 * MINUTES))); fi
    step tests "$limit" env OMP_NUM_THREADS=1 "$PYTHON" "${PYTEST[@]}" "${files[@]}" -k "$rest"
fi
if ! wanted large; then
    :
elif [ -n "$REHEARSE" ]; then
    say large "rehearsed: needs a GPU"
else
    step large 70 "$PYTHON" "${ALONE[@]}" tests/gpu/test_triton_cuda.py -k "$LARGE"
fi

if ! wanted constants; then
    :
elif [ -n "$REHEARSE" ]; then
    say constants "rehearsed: needs a GPU"
else
    step constants 100 "$PYTHON" -m pcfast.bench.constants.measure --out "$OUT/constants.json"
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

# measured NAME SECONDS LIMIT ARGUMENTS...: a benchmark that stops by itself after SECONDS; LIMIT is for what hangs.
# A process of its own: a kernel that breaks takes the context of its process with it.
measured() {
    local name=$1 seconds=$2 limit=$3
    shift 3
    if [ "$seconds" -lt 20 ]; then say "$name" "not reached: out of time"; return 1; fi
    step "$name" "$limit" "$PYTHON" -m pcfast bench "$@" --minutes "$(for_minutes "$seconds")" --json "$OUT/$name.json"
    keep "$name"
}

if ! wanted kernels; then
    :
elif [ -z "$REHEARSE" ]; then
    # a fifth of the time; all of it where nothing else is wanted
    seconds=$(at_most $((12 * MINUTES)) $(($(left) - 40)))
    [ "$ONLY" != kernels ] || seconds=$(($(left) - 40))
    measured kernels "$seconds" $((seconds + 40)) --kernels
elif "$PYTHON" -c 'import triton' 2> /dev/null; then
    host_module
    # interpreted, or compiled for the CPU, on sizes that say nothing of their speed
    step kernels 120 env TRITON_INTERPRET=1 PYTHONPATH="tests/kernels${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c '
import sys, interpreter
interpreter.repair()
from pcfast.cli import main
sys.exit(main(sys.argv[1:]))' bench --kernels --quick --precision ieee --precision bf16 --device cpu \
        --json "$OUT/kernels.json"
    keep kernels
else
    say kernels "not rehearsed: triton is not installed"
fi

# named OPTION VALUE...: OPTION before each
named() { local option=$1; shift; printf -- "$option %s " "$@"; }
FIRST=$(named --contender cuda triton eager literal plain_graph backpropagation_graph)
COMPILERS=$(named --contender plain_compiled jax)

if ! wanted bench; then
    :
elif [ -n "$REHEARSE" ]; then
    step bench 120 "$PYTHON" -m pcfast bench tiny_exact --contender eager --contender backpropagation --quick \
        --device cpu --json "$OUT/bench.json"
    keep bench
else
    # the compilers take a minute or two for a case: two networks alone, in what is left
    kept=60
    if [ "$(left)" -ge 240 ]; then kept=160; fi
    seconds=$(($(left) - kept))
    measured bench "$seconds" $((seconds + 60)) $FIRST
    seconds=$(($(left) - 60))
    measured compilers "$seconds" $((seconds + 60)) mlp_600 mnist_cnn $COMPILERS
fi

if ! wanted sanitizer; then
    :
elif ! command -v compute-sanitizer > /dev/null; then
    say sanitizer "not run: there is no compute-sanitizer"
elif [ -n "$REHEARSE" ]; then
    say sanitizer "rehearsed: needs a GPU"
else
    # The CUDA kernel alone: what triton compiles has less of its own to go wrong. torch's cache would hide what lies
    # outside a tensor.
    help=$(compute-sanitizer --help 2>&1)
    for tool in memcheck racecheck synccheck; do
        if [[ $help != *"$tool"* ]]; then
            say "$tool" "not run: this compute-sanitizer has no $tool"
            continue
        fi
        step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 PCFAST_CUDA_GRAPHS=0 compute-sanitizer --tool "$tool" \
            --report-api-errors no --error-exitcode 1 "$PYTHON" "${ALONE[@]}" -x tests/gpu/test_resident_cuda.py \
            -k "$SANITIZED"
    done
fi

echo
for name in kernels bench compilers; do [ ! -f "$TABLES/$name.txt" ] || cat "$TABLES/$name.txt"; done
echo
cat "$SUMMARY"
exit $STATUS
