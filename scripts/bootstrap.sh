#!/usr/bin/env bash
# Makes sure that a bare Debian machine can build: a C++17 compiler, Python headers and venv.
# usage: bootstrap.sh PYTHON
set -euo pipefail
python="${1:-python3}"

missing=()
command -v c++ >/dev/null 2>&1 || missing+=(g++)
command -v "$python" >/dev/null 2>&1 || missing+=(python3)
if command -v "$python" >/dev/null 2>&1; then
  "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
  "$python" - <<'PY' || missing+=(python3-dev)
import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())
PY
else
  missing+=(python3-venv python3-dev)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "setup: these Debian packages are missing: ${missing[*]}; install them (apt-get install ${missing[*]}) and run make again" >&2
  exit 2
fi
for try in 1 2 3; do
  if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; then
    exit 0
  fi
  sleep $((try * 5))
done
echo "setup: apt-get could not install ${missing[*]} in three tries; see its messages above" >&2
exit 2
