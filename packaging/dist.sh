#!/usr/bin/env bash
# What a release consists of, in dist/ (or in the folder that DIST names). Names hold the version and the target; the same program and commit give
# the same bytes. No other target than this machine's: the program itself writes its manual pages and completions.
#
#   packaging/dist.sh check PYTHON      is everything there for a release? Then nothing is left of an earlier one
#   packaging/dist.sh program           builds the program, and makes the three below of it
#   packaging/dist.sh archive PROGRAM   tidegate-VERSION-TARGET.tar.gz: the program, completions, manual pages, unit, permissions, documents
#   packaging/dist.sh package PROGRAM   tidegate_VERSION_ARCHITECTURE.deb
#   packaging/dist.sh bill              tidegate-VERSION-TARGET.cdx.json: the crates in it, as CycloneDX
#   packaging/dist.sh chart PYTHON      tidegate-chart-VERSION.tgz, by the Python that has the Helm library
#   packaging/dist.sh checksums         SHA256SUMS of everything that is there
#   packaging/dist.sh notes VERSION     what CHANGELOG.md says of a version, on stdout
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${DIST:-dist}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# What is built is kept apart from everyday builds, whose flags differ.
target_folder=${CARGO_TARGET_DIR:-target/dist}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022

say() { echo "dist: $*" >&2; }
fail() { say "$*"; exit 69; }
# Whoever makes a release is told everything that is missing at once.
require() {
    local missing=()
    for need in "$@"; do
        case $need in
        clean) [ -n "${DIRTY:-}" ] || [ -z "$(git status --porcelain)" ] \
            || missing+=("the tree has changes that are not committed: commit them, or say DIRTY=1 for a trial") ;;
        cargo-*) cargo "${need#cargo-}" --version > /dev/null 2>&1 || missing+=("$need: make dist-tools") ;;
        */python) [ -x "$need" ] || missing+=("the Helm library: install python3 with venv, and see tests/helm/requirements.txt") ;;
        dpkg-deb) command -v dpkg-deb > /dev/null || missing+=("dpkg-deb: install dpkg, or run this in a container of Debian") ;;
        esac
    done
    [ ${#missing[@]} = 0 ] || { printf 'dist: missing: %s\n' "${missing[@]}" >&2; exit 69; }
}
target() { rustc --version --verbose | sed -n 's/^host: //p'; }

build() {
    # Machines differ in where things lie: the program tells of none of these places.
    RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$PWD=/tidegate" \
        cargo auditable build --release --locked --bin tidegate --target-dir "$target_folder"
    # The list of crates is in a section of its own, which scanners of images look for.
    grep --quiet --text --fixed-strings .dep-v0 "$target_folder/release/tidegate" || fail "the program lacks the list of its crates"
}

archive() {
    local program=$1 name root
    name=tidegate-$version-$(target)
    root=$(mktemp -d)
    install -D -m 0755 "$program" "$root/$name/tidegate"
    packaging/texts.sh "$program" "$root/$name"
    install -D -m 0644 -t "$root/$name/systemd" packaging/tidegate.service packaging/tidegate.toml
    install -m 0644 -t "$root/$name" README.md ARCHITECTURE.md CHANGELOG.md SECURITY.md LICENSE-APACHE LICENSE-MIT
    git ls-files 'docs/*.md' | while read -r text; do install -D -m 0644 "$text" "$root/$name/$text"; done
    mkdir -p "$folder"
    tar --create --directory "$root" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" "$name" \
        | gzip -9n > "$folder/$name.tar.gz"
    rm -r "$root"
    echo "$folder/$name.tar.gz"
}

bill() {
    name=tidegate-$version-$(target)
    mkdir -p "$folder"
    # It is written beside each manifest, the lab's too, and names the folder that it was made in.
    trap 'rm -f "$name.cdx.json" "lab/$name.cdx.json"' EXIT
    cargo cyclonedx --quiet --format json --spec-version 1.5 --all --target "$(target)" --override-filename "$name.cdx"
    sed "s|path+file://$PWD|path+file:///tidegate|g" "$name.cdx.json" > "$folder/$name.cdx.json"
    echo "$folder/$name.cdx.json"
}

chart() {
    local python=$1 root made name
    mkdir -p "$folder"
    # Helm keeps the times of the files, and those are of the checkout: here they get the commit's.
    root=$(mktemp -d)
    cp -r helm/tidegate "$root/"
    find "$root" -exec touch --date "@$SOURCE_DATE_EPOCH" {} +
    made=$("$python" -c 'import sys, helm_python
print(helm_python.package(sys.argv[1], destination=sys.argv[2], app_version=sys.argv[3]))' "$root/tidegate" "$folder" "$version")
    rm -r "$root"
    # Beside the archives its name says what it is.
    name=tidegate-chart-${made##*/tidegate-}
    mv "$made" "$folder/$name"
    echo "$folder/$name"
}

checksums() {
    rm -f "$folder/SHA256SUMS"
    (cd "$folder" && sums=$(LC_ALL=C sha256sum -- *) && echo "$sums" > SHA256SUMS && sha256sum --check --quiet SHA256SUMS)
    cat "$folder/SHA256SUMS"
}

notes() {
    awk -v version="$1" '/^## / { here = ($2 == version || $2 == "[" version "]"); next } here { print; any = 1 } END { exit !any }' CHANGELOG.md \
        || fail "CHANGELOG.md has no section for $1"
}

of_a_program=(clean cargo-auditable cargo-cyclonedx dpkg-deb)
case ${1:?what to do} in
check)
    require "${of_a_program[@]}" "${2:?the Python that has the Helm library}"
    rm -f "$folder"/tidegate[-_]* "$folder/SHA256SUMS"
    ;;
program)
    require "${of_a_program[@]}"
    build
    archive "$target_folder/release/tidegate"
    packaging/deb.sh "$target_folder/release/tidegate" "$folder"
    bill
    ;;
archive) archive "${2:?the program}" ;;
package) packaging/deb.sh "${2:?the program}" "$folder" ;;
bill) require cargo-cyclonedx && bill ;;
chart) require clean "${2:?the Python that has the Helm library}" && chart "$2" ;;
checksums) checksums ;;
notes) notes "${2:?the version}" ;;
*) fail "unknown: $1" ;;
esac
