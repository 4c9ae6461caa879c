# shellcheck shell=bash
# For tests in shell that source it: waits for what they look at. They have a function fail.

# Asks again, twice a second, until it holds.
until_holds() {
    local what=$1 deadline=$((SECONDS + ${LIMIT:-90})); shift
    until "$@"; do
        [ $SECONDS -lt $deadline ] || fail "$what: not within ${LIMIT:-90} s"
        sleep 0.5
    done
}
