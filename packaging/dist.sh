#!/usr/bin/env bash
# What a release has for one architecture: an archive with the program and its documents, the Debian package, the bill of materials and checksums.
#
#   packaging/dist.sh target/release/tidegate target/dist
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:?the program} folder=${2:?the folder for the release}
version=$("$program" --version | cut -d ' ' -f 2)
name=tidegate-$version-$(uname -m)-linux-gnu
rm -rf "$folder" && mkdir -p "$folder/$name"
cp "$program" README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT packaging/tidegate.service packaging/tidegate.toml "$folder/$name/"
# The same input gives the same archive: names in order, one time, one owner.
tar --create --gzip --file "$folder/$name.tar.gz" --directory "$folder" --sort=name --owner=0 --group=0 --numeric-owner \
    --mtime="@$(git log -1 --format=%ct)" "$name"
rm -r "${folder:?}/$name"
packaging/deb.sh "$program" "$folder" > /dev/null
cargo cyclonedx --format json --all --override-filename "$name.cdx" > /dev/null
mv "$name.cdx.json" "$folder/" && rm -f "lab/$name.cdx.json"
(cd "$folder" && sha256sum ./* > "$name.sha256" && sha256sum --check --quiet "$name.sha256")
ls "$folder"
