#!/usr/bin/env bash
# Creates .venv in the root of the repository and installs the package into it; sourced by the other scripts.
# Usage: source scripts/setup.sh EXTRA      EXTRA is "" or test, and required: else $1 would be the caller's
# CPU_ONLY=1 installs PyTorch without CUDA, which is smaller.
set -euo pipefail
extra=${1?usage: source scripts/setup.sh EXTRA}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "Python 3.11 or newer is needed, but '$python' is $("$python" --version 2>&1 || true)." \
    "Install a newer one, or choose it: PYTHON=python3.12 $0" >&2
  exit 2
fi
if [ ! -x .venv/bin/pip ]; then
  "$python" -m venv .venv || { echo "Cannot create .venv; on Debian and Ubuntu install python3-venv first." >&2; exit 2; }
fi
stamp=.venv/installed${extra:+-$extra}
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "Installing into .venv (PyTorch is large: a few minutes the first time) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" \
    ${CPU_ONLY:+--extra-index-url https://download.pytorch.org/whl/cpu}
  touch .venv/installed "$stamp"
fi
