#!/usr/bin/env bash
# Runs the tests; installs what is missing. Arguments go to pytest, paths count from the
# repository's folder:
#   bash scripts/test.sh                        all but the slow ones
#   bash scripts/test.sh tests/test_dit.py -x   some
#   bash scripts/test.sh -m slow                the slow ones; -m "" for all
# pytest's own options: python -m pytest --help
set -euo pipefail
case ${1:-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash install.sh --dev)
# Most of the time goes into compiling, on one core, and some into waiting: one process more than
# the two cores of the machines that this runs on. A file stays with one; those of few tests, which
# take longest, are not left for the end.
exec "$python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
