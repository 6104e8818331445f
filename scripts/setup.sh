# Sourced by demo.sh and test.sh: a virtual environment in the clone with the package installed in place.
# Leaves the clone's root as the working folder and its environment's programs first on PATH.
# ZOO_PYTHON names another interpreter than python3; ZOO_VENV another place than .venv.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
  echo "error: $*" >&2
  exit 1
}

# zoo_setup EXTRAS: the extras of pyproject.toml to install, such as "recipes" or "recipes,dev".
zoo_setup() {
  local extras="$1" python="${ZOO_PYTHON:-python3}" venv="${ZOO_VENV:-.venv}" stamp wanted
  command -v "$python" >/dev/null || stop "$python not found: install Python 3.11 or newer, or set ZOO_PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$("$python" --version) found, 3.11 or newer needed: set ZOO_PYTHON to a newer interpreter"
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import ensurepip' 2>/dev/null ||
      stop "$python cannot create virtual environments: install its venv package (Debian: python3-venv)"
    echo "== creating a virtual environment in $venv"
    "$python" -m venv "$venv"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
  # Installed again only when what it was installed from has changed.
  stamp="$venv/installed-${extras//,/-}"
  wanted="$(cksum <pyproject.toml) $PWD"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing attnzoo[$extras] (a few minutes the first time)"
    case ",$extras,$(uname)," in
      *,all,*Linux, | *,dev,*Linux,)
        # In an isolated build natten would fetch a second torch, gigabytes and minutes.
        python -m pip install -qq --disable-pip-version-check "torch>=2.11" "setuptools>=77" &&
          python -m pip install -qq --disable-pip-version-check --no-build-isolation "natten>=0.21.6" ||
          stop "installation of natten failed: pip's message is above"
        ;;
    esac
    python -m pip install -qq --disable-pip-version-check --editable ".[$extras]" ||
      stop "installation failed: pip's message is above; check the network and the free disk space (8 GB needed)"
    echo "$wanted" >"$stamp"
  else
    echo "== environment $venv is up to date"
  fi
}
