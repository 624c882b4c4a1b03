# shellcheck shell=bash
# What became of the command here: none | running | other (a run of another command) | stopped | ended CODE.
set -euo pipefail
: "${command[@]:?}"
run="$HOME/sgw_jax_run"
same() { printf '%s\0' "${command[@]}" | cmp --silent - "$run/command"; }
if [ ! -e "$run/command" ]; then
  echo "sgw_jax: none"
elif ! flock --nonblock "$run/lock" true; then
  if same; then echo "sgw_jax: running"; else echo "sgw_jax: other"; fi
elif ! same; then
  echo "sgw_jax: none"
elif [ -e "$run/stopped" ]; then
  echo "sgw_jax: stopped"
else
  echo "sgw_jax: ended $(cat "$run/exit_code" 2>/dev/null || echo without code)"
fi
