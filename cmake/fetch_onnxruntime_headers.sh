#!/usr/bin/env bash
# Fetches the C++ headers of ONNX Runtime 1.21 (API 21) into build/deps/onnxruntime/include/onnxruntime.
# No Python wheel carries them, so they come out of Debian trixie's libonnxruntime-dev, whatever Debian the
# machine runs: apt gets package lists of its own, nothing is installed and the system's lists stay as they are.
# Does nothing when the headers are there already or ONNXRUNTIME_INCLUDE_DIR names another copy.
set -euo pipefail
cd "$(dirname "$0")/.."

package=libonnxruntime-dev
suite=trixie
target=build/deps/onnxruntime
header=include/onnxruntime/onnxruntime_cxx_api.h

[ -f "$target/$header" ] && exit 0
if [ -n "${ONNXRUNTIME_INCLUDE_DIR:-}" ]; then
  [ -f "$ONNXRUNTIME_INCLUDE_DIR/onnxruntime_cxx_api.h" ] && exit 0
  echo "ONNXRUNTIME_INCLUDE_DIR=$ONNXRUNTIME_INCLUDE_DIR has no onnxruntime_cxx_api.h; unset it or name the folder that has" >&2
  exit 2
fi
for tool in apt-get dpkg; do
  if ! command -v "$tool" >/dev/null 2>&1; then
    echo "the headers of ONNX Runtime come from a Debian package, and this machine has no $tool; set ONNXRUNTIME_INCLUDE_DIR to a folder with onnxruntime_cxx_api.h" >&2
    exit 2
  fi
done

# The Debian mirror that this machine uses already.
mirror="${DACO_RT_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | sort -u | grep -m1 '/debian/\?$' || true)}"
if [ -z "$mirror" ]; then
  echo "no Debian mirror in apt's sources; set DACO_RT_DEBIAN_MIRROR or ONNXRUNTIME_INCLUDE_DIR" >&2
  exit 2
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,unpacked}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
: >"$work/status"
# apt as root downloads as a user that may not write here.
chmod -R a+rwX "$work"
apt=(apt-get -q
  -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::Etc::PreferencesParts=-
  -o "Dir::State::Lists=$work/lists" -o "Dir::State::Status=$work/status" -o "Dir::Cache=$work/cache"
  -o Acquire::Retries=3 -o APT::Get::List-Cleanup=0 -o Acquire::Languages=none)

fetch() { "${apt[@]}" update && (cd "$work" && "${apt[@]}" download "$package"); }

for try in 1 2 3; do
  if fetch >"$work/log" 2>&1; then
    dpkg -x "$work"/"$package"_*.deb "$work/unpacked"
    mkdir -p "$target"
    rm -rf "$target/include" "$target/include.partial"
    cp -r "$work/unpacked/usr/include" "$target/include.partial"
    mv "$target/include.partial" "$target/include"
    echo "headers of ONNX Runtime: $target/include/onnxruntime ($(basename "$work"/"$package"_*.deb .deb))"
    exit 0
  fi
  echo "fetching $package failed (try $try of 3)" >&2
  sleep $((try * 5))
done
tail -n 5 "$work/log" >&2
echo "could not fetch $package of Debian $suite from $mirror; check the network, or set ONNXRUNTIME_INCLUDE_DIR" >&2
exit 2
