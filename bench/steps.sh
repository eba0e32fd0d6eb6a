# Steps with limits, for on_gpu.sh to source: each leaves what it printed, tracebacks too, when its time runs out.
# Read: DEADLINE (of SECONDS), SUMMARY, LOG, SAID. Set: STATUS, 1 once a step has failed.

left() { echo $((DEADLINE - SECONDS)); }

# at_most SECONDS...: the least of them
at_most() { printf '%s\n' "$@" | sort -n | head -n 1; }

# say NAME VERDICT
say() { printf '%-12s %s\n' "$1" "$2" | tee -a "$SUMMARY"; }

# Ctrl-C, which Python and pytest answer by saying where they were; also where this shell was started with it ignored.
HEARS_INTERRUPT=()
env --default-signal=INT true 2> /dev/null && HEARS_INTERRUPT=(env --default-signal=INT)

# step NAME SECONDS COMMAND...: run with a limit, output to the log and to $SAID; the verdict is the last line of it.
step() {
    local name=$1 limit=$2 started=$SECONDS status verdict
    shift 2
    rm -f "$SAID"
    if [ "$(left)" -lt 10 ]; then say "$name" "not reached: out of time"; return 1; fi
    [ "$limit" -le "$(left)" ] || limit=$(left)
    echo "== $name: $*" >> "$LOG"
    timeout --signal=INT --kill-after=20 "$limit" "${HEARS_INTERRUPT[@]}" "$@" > "$SAID" 2>&1
    status=$?
    cat "$SAID" >> "$LOG"
    verdict=$(grep -v '^[[:space:]]*$' "$SAID" | tail -n 1 | cut -c1-160)
    case $status in
        0) say "$name" "ok, $((SECONDS - started)) s: $verdict" ;;
        124 | 137) say "$name" "FAILED: not done after $limit s: $verdict"; STATUS=1 ;;
        *) say "$name" "FAILED, status $status: $verdict"; STATUS=1 ;;
    esac
    return $status
}
