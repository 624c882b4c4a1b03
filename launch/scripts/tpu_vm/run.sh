# shellcheck shell=bash
# Starts the command, if none runs, and leaves it running.
set -euo pipefail
: "${command[@]:?}"
code="$HOME/sgw_jax"
run="$HOME/sgw_jax_run"
mkdir -p "$run"
cd "$code"
# The kernel gives the lock free when the run ends, however it ends.
exec 9>"$run/lock"
flock --nonblock 9 || {
  echo "sgw_jax: runs already on $(hostname), process $(cat "$run/pid"); stop it first" >&2
  exit 3
}
rm -f "$run/pid" "$run/exit_code" "$run/stopped"
# In an ssh session nothing says that a host is one of several (GKE's TPU_WORKER_HOSTNAMES is not there): the metadata
# server does.
attribute() {
  curl --silent --show-error --fail --max-time 20 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
endpoints=$(attribute worker-network-endpoints)
IFS=, read -r -a workers <<<"$endpoints"
if [ "${#workers[@]}" -gt 1 ]; then
  SGW_COORDINATOR="${workers[0]##*:}:8482"
  SGW_PROCESSES="${#workers[@]}"
  SGW_PROCESS=$(attribute agent-worker-number)
  export SGW_COORDINATOR SGW_PROCESSES SGW_PROCESS
fi
export PATH="$code/.venv/bin:$PATH"
printf '%s\0' "${command[@]}" >"$run/command"
(
  trap '' HUP
  "${command[@]}" &
  echo "$!" >"$run/pid"
  ended=0
  wait "$!" || ended=$?
  echo "$ended" >"$run/exit_code"
) >>"$run/log" 2>&1 </dev/null &
until [ -s "$run/pid" ]; do sleep 0.05; done
echo "sgw_jax: started on $(hostname)"
