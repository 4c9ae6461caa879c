#!/usr/bin/env bash
# Makes an OpenTelemetry collector (rotel) and a Prometheus with its promtool available for the tests with real parts; nothing is installed
# or started. `tests/observability.sh prometheus` leaves the collector out.
#
# What is fetched goes to .servers/. What could be had is printed, ready to be sourced; for the rest the reason is printed instead, and
# the test says that it was skipped. TIDEGATE_ROTEL, TIDEGATE_PROMETHEUS and TIDEGATE_PROMTOOL name
# programs of one's own.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
home=$PWD/.servers/observability

missing() { echo "export $1_MISSING='$2'"; }

collector_place() {
    if [ -n "${TIDEGATE_ROTEL:-}" ]; then echo "export TIDEGATE_ROTEL=$TIDEGATE_ROTEL"; return; fi
    local agent=$home/rotel/rotel/rotel-agent python
    if [ ! -x "$agent" ]; then
        python=$(command -v python3) || { missing TIDEGATE_ROTEL "python3 is missing"; return; }
        rm -rf "$home/rotel" && mkdir -p "$home/rotel"
        "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
            -r tests/observability.txt -d "$home/rotel" >&2 \
            || { missing TIDEGATE_ROTEL "pip could not fetch it: no network, or no wheel for this machine"; return; }
        (cd "$home/rotel" && for wheel in *.whl; do "$python" -m zipfile -e "$wheel" .; done && rm ./*.whl)
        chmod +x "$agent"
    fi
    "$agent" --version > /dev/null 2>&1 || { missing TIDEGATE_ROTEL "it does not run on this machine"; return; }
    echo "export TIDEGATE_ROTEL=$agent"
}

# The newest one of Debian, from the mirror this machine uses already and checked by its key; apt's own configuration is left as it is.
prometheus_place() {
    local own uri options root=$home/prometheus
    own=${TIDEGATE_PROMETHEUS:-$(type -P prometheus || true)}
    if [ -n "$own" ]; then
        echo "export TIDEGATE_PROMETHEUS=$own"
        own=${TIDEGATE_PROMTOOL:-$(type -P promtool || true)}
        if [ -n "$own" ]; then echo "export TIDEGATE_PROMTOOL=$own"; else missing TIDEGATE_PROMTOOL "promtool is not installed"; fi
        return
    fi
    if [ ! -x "$root/usr/bin/prometheus" ] || [ ! -x "$root/usr/bin/promtool" ]; then
        command -v apt-get > /dev/null || { missing TIDEGATE_PROMETHEUS "there is no apt-get, and no prometheus is installed"; return; }
        uri=$({
            sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources
            sed -nE 's/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list
        } 2> /dev/null | tr ' ' '\n' | grep -E '/debian/?$' | head -n 1 || true)
        [ -n "$uri" ] || { missing TIDEGATE_PROMETHEUS "apt knows no Debian mirror"; return; }
        mkdir -p "$root/parts" "$root/lists/partial" "$root/archives/partial"
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri sid main" > "$root/parts/sid.list"
        options=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$root/parts" -o "Dir::State::Lists=$root/lists"
            -o "Dir::Cache::archives=$root/archives" -o APT::Sandbox::User=root)
        { apt-get "${options[@]}" update && (cd "$root/archives" && apt-get "${options[@]}" download prometheus promtool) \
            && dpkg-deb -x "$root"/archives/prometheus_*.deb "$root" && dpkg-deb -x "$root"/archives/promtool_*.deb "$root"; } >&2 \
            || { missing TIDEGATE_PROMETHEUS "apt could not fetch it"; return; }
        rm -rf "$root/parts" "$root/lists" "$root/archives"
    fi
    "$root/usr/bin/prometheus" --version > /dev/null 2>&1 \
        || { missing TIDEGATE_PROMETHEUS "the one of Debian does not run on this machine"; return; }
    echo "export TIDEGATE_PROMETHEUS=$root/usr/bin/prometheus"
    echo "export TIDEGATE_PROMTOOL=$root/usr/bin/promtool"
}

[ "${1:-}" = prometheus ] || collector_place
prometheus_place
