#!/usr/bin/env bash
# Fetches captioned pictures into build/deps/pictures, or the folder given as first argument:
#   emoji-google, emoji-twitter   npm emoji-datasource-google, -twitter 16.0.0, words of npm emojibase-data 17.0.0
#   openclipart                   Debian openclipart-png
#   tuxpaint                      Debian tuxpaint-stamps-default (GPL: to evaluate with, not to train or ship)
# Each folder gets a captions.jsonl, so that --corpus folder:DIR reads it, and the licence of its pictures; the
# folder above gets one of all but tuxpaint.
# Nothing is installed and no root is needed; a folder that is there is left as it is. 430 MB are downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
target="${1:-build/deps/pictures}"
python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python3

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# apt as root downloads as a user that may not write here.
chmod a+rwX "$work"
mkdir -p "$target"

need() {
  command -v "$1" >/dev/null 2>&1 && return
  echo "the pictures come from $2, and this machine has no $1; install it and run this again" >&2
  exit 2
}

# try NAME COMMAND…: up to three times
try() {
  local what="$1" attempt
  shift
  for attempt in 1 2 3; do
    (cd "$work" && "$@") >"$work/log" 2>&1 && return
    echo "fetching $what failed (try $attempt of 3)" >&2
    sleep $((attempt * 5))
  done
  tail -n 5 "$work/log" >&2
  echo "could not fetch $what; check the network (for Debian packages also run apt-get update)" >&2
  exit 2
}

npm_package() { # NAME VERSION SHA256
  need npm "the npm registry"
  try "$1" npm pack --silent "$1@$2"
  if ! echo "$3  $work/$1-$2.tgz" | sha256sum --check --quiet; then
    echo "$1-$2.tgz is not the file that was tested (SHA-256 $3)" >&2
    exit 2
  fi
  mkdir -p "$work/$1"
  tar -xzf "$work/$1-$2.tgz" -C "$work/$1" --strip-components 1
  rm "$work/$1-$2.tgz"
}

debian_package() { # NAME SHA256
  need apt-get "a Debian package"
  need dpkg "a Debian package"
  try "$1" apt-get -q download "$1"
  local found
  found="$(sha256sum "$work/$1"_*.deb | cut -d' ' -f1)"
  [ "$found" = "$2" ] || echo "note: $1 has SHA-256 $found, tested was $2" >&2
  dpkg -x "$work/$1"_*.deb "$work/$1"
  rm "$work/$1"_*.deb
}

place() { # NAME: the finished folder takes its place in one step
  rm -rf "$target/$1"
  mv "$work/out" "$target/$1"
  echo "$target/$1: $(wc -l <"$target/$1/captions.jsonl") captioned pictures"
}

for maker in google twitter; do
  [ -f "$target/emoji-$maker/captions.jsonl" ] && continue
  if [ "$maker" = google ]; then
    npm_package emoji-datasource-google 16.0.0 fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438
  else
    npm_package emoji-datasource-twitter 16.0.0 f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877
  fi
  [ -d "$work/emojibase-data" ] ||
    npm_package emojibase-data 17.0.0 d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a
  "$python" scripts/picture_captions.py "emoji-$maker" "$work" "$work/out"
  place "emoji-$maker"
done
if [ ! -f "$target/openclipart/captions.jsonl" ]; then
  debian_package openclipart-png f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02
  "$python" scripts/picture_captions.py openclipart "$work" "$work/out"
  place openclipart
fi
if [ ! -f "$target/tuxpaint/captions.jsonl" ]; then
  debian_package tuxpaint-stamps-default 6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34
  "$python" scripts/picture_captions.py tuxpaint "$work" "$work/out"
  place tuxpaint
fi
"$python" scripts/picture_captions.py join "$target"
