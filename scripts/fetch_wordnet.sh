#!/usr/bin/env bash
# Fetches WordNet 3.0 (Debian's wordnet-base) into build/deps/wordnet, or the folder given as argument.
# The package is downloaded and unpacked; nothing is installed and no root is needed.
# Does nothing when the files are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

package=wordnet-base
version=1:3.0-37
sha256=61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752
target="${1:-build/deps/wordnet}"

[ -f "$target/data.noun" ] && exit 0
for tool in apt-get dpkg sha256sum; do
  if ! command -v "$tool" >/dev/null 2>&1; then
    echo "WordNet comes from a Debian package, and this machine has no $tool; set DACO_RT_WORDNET to a folder with data.noun" >&2
    exit 2
  fi
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# apt as root downloads as a user that may not write here.
chmod a+rwX "$work"
fetch() { (cd "$work" && { apt-get -q download "$package=$version" || apt-get -q download "$package"; }); }

for try in 1 2 3; do
  if fetch >"$work/log" 2>&1; then
    found="$(sha256sum "$work"/"$package"_*.deb | cut -d' ' -f1)"
    if [ "$found" != "$sha256" ]; then
      # Another revision of the package may carry the same words: it is used, and said.
      echo "note: $(basename "$work"/"$package"_*.deb) has SHA-256 $found, tested was $version with $sha256" >&2
    fi
    dpkg -x "$work"/"$package"_*.deb "$work/unpacked"
    mkdir -p "$(dirname "$target")"
    rm -rf "$target.partial"
    cp -r "$work/unpacked/usr/share/wordnet" "$target.partial"
    cp "$work/unpacked/usr/share/doc/$package/copyright" "$target.partial/COPYRIGHT"
    rm -rf "$target"
    mv "$target.partial" "$target"
    echo "WordNet: $target ($package, SHA-256 $found)"
    exit 0
  fi
  echo "fetching $package failed (try $try of 3)" >&2
  sleep $((try * 5))
done
tail -n 5 "$work/log" >&2
echo "could not fetch $package; run apt-get update, check the network, or set DACO_RT_WORDNET to a WordNet folder" >&2
exit 2
