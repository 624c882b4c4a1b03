# shellcheck shell=bash
# Asks the run to save and stop, and waits until it has.
set -euo pipefail
: "${seconds:?}"
run="$HOME/sgw_jax_run"
if [ ! -e "$run/lock" ] || flock --nonblock "$run/lock" true; then
  echo "sgw_jax: nothing runs on $(hostname)"
  exit 0
fi
# Tells a stop that was asked for from a preemption, which ends a run in the same way.
touch "$run/stopped"
kill -TERM "$(cat "$run/pid")" || true
flock --wait "$seconds" "$run/lock" true || {
  echo "sgw_jax: still saving on $(hostname) after $seconds seconds" >&2
  exit 1
}
echo "sgw_jax: stopped on $(hostname)"
