#!/usr/bin/env bash
# Lint, types and the quick tests (at most 10 minutes on two cores); with --all also the long ones.
case "${1:-}" in
  "") selection=(-m "not long") ;;
  --all) selection=() ;;
  *) echo "usage: scripts/test.sh [--all]" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh" test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest "${selection[@]}"
