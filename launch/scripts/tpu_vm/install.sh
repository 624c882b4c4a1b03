# shellcheck shell=bash
# The repository at a revision, in ~/sgw_jax, and its environment.
set -euo pipefail
: "${repository:?}" "${revision:?}"
code="$HOME/sgw_jax"
if [ ! -d "$code/.git" ]; then
  git clone --quiet --no-checkout "$repository" "$code"
fi
cd "$code"
git remote set-url origin "$repository"
git fetch --quiet --force --tags --prune origin '+refs/heads/*:refs/remotes/origin/*'
# A branch is taken as the remote has it.
commit=$(git rev-parse --quiet --verify "refs/remotes/origin/$revision^{commit}" ||
  git rev-parse --quiet --verify "$revision^{commit}") || {
  echo "sgw_jax: --revision: '$revision' found; allowed is a branch, tag or commit of $repository" >&2
  exit 1
}
git checkout --quiet --force --detach "$commit"
# The images' own Python is 3.10, too old; uv fetches a newer one.
if [ ! -x .venv/bin/python ]; then
  python=""
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -n "$python" ]; then
    "$python" -m venv .venv
  else
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
fi
.venv/bin/python -m pip install --quiet --editable '.[train,tpu]'
echo "sgw_jax: installed $commit"
