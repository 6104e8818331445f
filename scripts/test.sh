#!/usr/bin/env bash
# Set up the environment and run the tests. Arguments go to pytest; without any, all but the slow ones run.
#   bash scripts/test.sh                 the fast tests on all cores
#   bash scripts/test.sh -m slow         the slow ones
#   bash scripts/test.sh tests/kernels   one folder
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
zoo_setup all
[ $# -gt 0 ] || set -- -m "not slow"
echo "== pytest $*"
# One thread in each worker: more would only compete for the same cores.
export OMP_NUM_THREADS=1
exec python -m pytest -q -n auto --maxprocesses 8 "$@"
