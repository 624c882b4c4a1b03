# shellcheck shell=bash
# A bucket at /mnt/runs, by Cloud Storage FUSE.
set -euo pipefail
: "${bucket:?}"
if ! mountpoint --quiet /mnt/runs; then
  command -v gcsfuse >/dev/null || {
    echo "sgw_jax: gcsfuse found nowhere on $(hostname); install it there, or mount /mnt/runs in another way" >&2
    exit 1
  }
  sudo mkdir -p /mnt/runs
  sudo chown "$USER" /mnt/runs
  gcsfuse --implicit-dirs "$bucket" /mnt/runs
fi
