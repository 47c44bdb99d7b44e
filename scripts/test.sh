#!/usr/bin/env bash
# Lint, types, and the quick tests (5 minutes on two cores); with --all also the long tests (less than an hour).
case "${1:-}" in
  "" | "#") selection=(-m "not long") ;;  # an interactive zsh passes the words of a comment
  --all) selection=() ;;
  *) echo "usage: scripts/test.sh [--all]" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh" test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Each test file runs in one process, so that its fixtures are created once.
OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile "${selection[@]}"
