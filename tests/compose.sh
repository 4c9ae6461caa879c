#!/usr/bin/env bash
# The compose file, for real: brings everything up, kills a worker container while the producer counts, and compares every counter in
# Valkey with its row in PostgreSQL. Where there is no Docker engine it says so and ends well.
#
#   TIDEGATE_BINARY_DIR   a folder with the program: the image is made from it, and nothing is compiled
#   OBSERVABILITY=1       Prometheus too: it must scrape both workers and load the rules
#   DOCKER_UP             further arguments of `docker compose up`, such as `--pull never`
set -eEuo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/until.sh
. tests/until.sh

say() { echo "compose: $*"; }
trap 'say "failed: ended by an error in line $LINENO"' ERR
skip() { say "skipped: $*"; exit 0; }
fail() { say "failed: $*"; logs; exit 1; }

command -v docker > /dev/null || skip "docker is not installed"
docker info > /dev/null 2>&1 || skip "no Docker engine answers (${DOCKER_HOST:-the default socket})"
docker compose version > /dev/null 2>&1 || skip "docker has no compose plugin"

export COMPOSE_PROJECT_NAME=tidegate-test-$$ TIDEGATE_IMAGE=tidegate:test-$$
# Free ports, chosen by the engine.
export PROMETHEUS_PORT=0 GRAFANA_PORT=0 POSTGRES_PASSWORD=only-for-this-test
files=(--file docker-compose.yml)
if [ -n "${TIDEGATE_BINARY_DIR:-}" ]; then
    TIDEGATE_BINARY_DIR=$(realpath "$TIDEGATE_BINARY_DIR")
    export TIDEGATE_BINARY_DIR
    files+=(--file tests/compose/given.yml)
fi
compose() { docker compose "${files[@]}" --profile observability "$@"; }
logs() { compose logs --no-color --tail 4 migrate worker valkey postgres || true; }
clean() { compose down --volumes --timeout 5 --rmi local > /dev/null 2>&1 || true; docker rmi "$TIDEGATE_IMAGE" > /dev/null 2>&1 || true; }
trap clean EXIT

valkey() { compose exec -T valkey valkey-cli "$@"; }
sql() { compose exec -T --env PGPASSWORD="$POSTGRES_PASSWORD" postgres psql --username app --no-align --tuples-only --field-separator ' ' --command "$1"; }
total() { sql 'select coalesce(sum(value), 0) from counters'; }
workers() { compose ps --quiet --status running worker | wc -l; }

in_valkey() {
    valkey --raw eval "local t = {} for _, key in ipairs(redis.call('KEYS', 'counter:*')) do t[#t + 1] = string.sub(key, 9) .. ' ' .. redis.call('GET', key) end return t" 0 | LC_ALL=C sort
}
in_postgresql() { sql 'select id, value from counters' | LC_ALL=C sort; }
equal() { [ "$(in_valkey)" = "$(in_postgresql)" ]; }

services=(valkey postgres migrate worker producer)
[ -z "${OBSERVABILITY:-}" ] || services+=(prometheus)
# shellcheck disable=SC2086 # several arguments
compose up --detach --quiet-pull ${DOCKER_UP:-} "${services[@]}" || fail "it does not start"
until_holds "two workers are healthy" eval '[ "$(compose ps --format "{{.Health}}" worker | grep -c "^healthy$")" = 2 ]'
say "two workers are healthy, as user $(docker inspect --format '{{.Config.User}}' "$(compose ps --quiet worker | sed -n 1p)")"

grown_beyond() { [ "$(total)" -gt "$1" ]; }
until_holds "counters are in PostgreSQL" grown_beyond 500

if [ -n "${OBSERVABILITY:-}" ]; then
    asked() { compose exec -T prometheus promtool query instant http://localhost:9090 "$1"; }
    until_holds "Prometheus scrapes both workers" eval '[ "$(asked "up{job=\"tidegate\"} == 1" | grep -c "=> 1")" = 2 ]'
    until_holds "Prometheus sees entries settled" eval 'asked "sum(tidegate_entries_settled_total) > 0" | grep "=>" > /dev/null'
    say "Prometheus scrapes both workers"
    # A rule that fails to load ends Prometheus; that each is evaluated is seen by its own metric.
    until_holds "the rules are evaluated" eval 'asked "sum(prometheus_rule_group_rules)" | grep -E "=> [1-9]" > /dev/null'
    # Every query of the dashboard shows something of a running Tidegate, but for what does not happen here: no flush has the 200 rows from
    # which it takes a turn, no server has failed, nothing was found that should not be, or is accepted, and no pipeline is managed. A rate needs two scrapes.
    queries=$(python3 -c '
import json
for panel in json.load(open("helm/tidegate/dashboards/tidegate.json"))["panels"]:
    for target in panel.get("targets", []):
        if not any(name in target["expr"] for name in ("tidegate_turn_", "tidegate_faults_", "tidegate_workers_failing", "tidegate_findings", "tidegate_acceptance_", "tidegate_managed_", "tidegate_cache_")):
            print(target["expr"].replace("$__rate_interval", "1m").replace("$namespace", ".*").replace("$pipeline", ".*"))') \
        || fail "python3 is needed to read the dashboard"
    while read -r query; do
        until_holds "a query of the dashboard shows something: $query" eval 'asked "$query" < /dev/null | grep "=>" > /dev/null'
    done <<< "$queries"
    say "every query of the dashboard shows something ($(wc -l <<< "$queries"))"
fi

victim=$(compose ps --quiet --status running worker | sed -n 1p)
docker kill --signal KILL "$victim" > /dev/null
say "a worker container was killed at $(total)"
until_holds "one worker is left" eval '[ "$(workers)" = 1 ]'
until_holds "its peer counts on" grown_beyond $(($(total) + 1000))
compose up --detach --no-recreate --no-deps worker > /dev/null 2>&1
until_holds "the worker is back" eval '[ "$(workers)" = 2 ]'

compose stop --timeout 5 producer > /dev/null 2>&1
LIMIT=60 until_holds "every counter is equal" equal
letters=$(sql 'select count(*) from tidegate.dead_letters')
[ "$letters" = 0 ] || fail "there are $letters dead letters"
[ "$(in_valkey | wc -l)" -gt 10 ] || fail "hardly any counters: the producer did not run"
say "$(in_valkey | wc -l) counters with a total of $(total) are equal in Valkey and PostgreSQL; a worker container was killed"

stopped=$(compose ps --quiet worker)
compose stop worker > /dev/null 2>&1
for worker in $stopped; do
    code=$(docker inspect --format '{{.State.ExitCode}}' "$worker")
    [ "$code" = 0 ] || fail "a worker that was told to stop ended with $code"
done
say "passed"
