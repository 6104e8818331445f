#!/usr/bin/env bash
# Set up the environment and run the tests. Arguments go to pytest; without any, all but the slow ones run.
#   bash scripts/test.sh                           the fast tests on all cores
#   bash scripts/test.sh tests/kernels             one folder
#   bash scripts/test.sh -m "slow and not large"   the slow ones, but for models of over 100 million parameters
#   bash scripts/test.sh -m large -n 1             those (16 GB of memory)
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
zoo_setup all
[ $# -gt 0 ] || set -- -m "not slow"
echo "== pytest $*"
# One thread in each worker: more would only compete for the same cores.
export OMP_NUM_THREADS=1
exec python -m pytest -q -n auto --maxprocesses 8 "$@"
