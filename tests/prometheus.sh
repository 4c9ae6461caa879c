#!/usr/bin/env bash
# Makes a Prometheus and its promtool available; nothing is installed and nothing is started. The last two lines printed say where they are,
# ready to be sourced. Exit code 69, with the reason, where they cannot be had.
#
# What is on the PATH is taken first; else the packages of Debian's sid are fetched from the mirror that this machine uses already, and unpacked
# below .servers/prometheus: programs in Go run on an older Debian as they are. apt's own configuration is left as it is.
set -eEuo pipefail
cd "$(dirname "$0")/.."
home=$PWD/.servers/prometheus

say() { echo "prometheus: $*" >&2; }
trap 'say "ended by an error in line $LINENO"' ERR
fail() { say "$*"; exit 69; }
found() {
    echo "export TIDEGATE_PROMETHEUS=$1"
    echo "export TIDEGATE_PROMTOOL=$2"
    exit 0
}

if command -v prometheus > /dev/null && command -v promtool > /dev/null; then found "$(command -v prometheus)" "$(command -v promtool)"; fi
if [ ! -x "$home/unpacked/usr/bin/promtool" ]; then
    command -v apt-get > /dev/null || fail "neither prometheus and promtool nor apt-get are here: install them"
    uri=$({
        sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources
        sed -nE 's/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list
    } 2> /dev/null | tr ' ' '\n' | grep -E '/debian/?$' | head -n 1 || true)
    [ -n "$uri" ] || fail "apt knows no Debian mirror: install prometheus and promtool"
    mkdir -p "$home/lists/partial" "$home/archives/partial" "$home/unpacked"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri sid main" > "$home/sources.list"
    options=(-qq -o "Dir::Etc::SourceList=$home/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$home/lists" -o "Dir::Cache::archives=$home/archives" -o APT::Sandbox::User=root)
    say "fetching prometheus and promtool"
    apt-get "${options[@]}" update >&2 || fail "apt-get update failed"
    (cd "$home/archives" && apt-get "${options[@]}" download prometheus/sid promtool/sid >&2) || fail "the packages could not be fetched"
    for package in "$home"/archives/*.deb; do dpkg-deb -x "$package" "$home/unpacked"; done
    rm -rf "$home/lists" "$home/archives" "$home/sources.list"
    "$home/unpacked/usr/bin/promtool" --version > /dev/null 2>&1 || fail "promtool of Debian's sid does not run here"
fi
found "$home/unpacked/usr/bin/prometheus" "$home/unpacked/usr/bin/promtool"
