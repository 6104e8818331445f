#!/usr/bin/env bash
# Run timm's own model tests over every model of the zoo. Arguments go to pytest, for example -k forward.
# The tests come from timm's source distribution of the installed version and stay in .cache, which git ignores.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
zoo_setup all

version="$(python -c 'import timm; print(timm.__version__)')"
source_folder=".cache/timm-$version"
if [ ! -f "$source_folder/tests/test_models.py" ]; then
  echo "== fetching the source distribution of timm $version"
  mkdir -p .cache
  python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary timm \
    --dest .cache "timm==$version" || stop "timm's source distribution cannot be fetched: check the network"
  tar -xzf ".cache/timm-$version.tar.gz" -C .cache "timm-$version/tests" ||
    stop "timm-$version.tar.gz holds no tests/; delete .cache and try again"
fi
# Away from timm's own configuration, and with the installed timm rather than the unpacked one.
export PYTHONPATH="$PWD/scripts" OMP_NUM_THREADS=1
exec python -m pytest -q -n auto --maxprocesses 8 -p timm_scope -p no:cacheprovider -c /dev/null \
  --rootdir "$source_folder/tests" -rs "$source_folder/tests/test_models.py" "$@"
