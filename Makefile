# Everything with one command, on a fresh machine with Rust, Node.js with npm, and Python 3 with pip.

.PHONY: help provision build demo bench bench-copy test lint deny clean
.DEFAULT_GOAL := help

CARGO ?= cargo
# What `make demo` hands on, such as DEMO="--rows 2000000 --keep".
DEMO ?=
# What `make bench` hands on, such as BENCH="a c --rounds 3 --scale 0.05"; `make bench-copy` does, too.
BENCH ?=
# What `make test` hands on to the test runner, such as TEST="copy::" to run what has this in its name.
TEST ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

provision: ## Bring PostgreSQL 13 to 18 and its client programs to .provision/
	@scripts/provision.sh

build: ## Build the release binary
	$(CARGO) build --release --locked

demo: build provision ## Move a live database between two throw-away servers
	PATH="$(CURDIR)/.provision/client/18/bin:$$PATH" target/release/pgtandem demo $(DEMO)

bench: build ## Measure how fast a backlog is followed, beside pgtandem's peers
	@scripts/provision.sh --with-peers
	$(CARGO) run --release --locked --quiet --manifest-path bench/Cargo.toml -- $(BENCH)

bench-copy: build ## Measure the first copy, beside pgtandem's peers
	@scripts/provision.sh --with-peers
	$(CARGO) run --release --locked --quiet --manifest-path bench/Cargo.toml -- copy $(BENCH)

# The documentation's examples first, so that the output ends with the summary of the tests.
test: provision ## Run all tests, those against real servers included
	$(CARGO) test --locked --quiet --doc $(TEST)
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --locked $${CI:+--profile ci} $(TEST); \
	else \
		set -x; $(CARGO) test --locked --lib --bins --tests $${CI:+--no-fail-fast} $(TEST); \
	fi

lint: ## Check the formatting and the lints
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

deny: ## Check licences, bans and sources of all dependencies
	@scripts/provision.sh --only-tools
	PATH="$$PATH:$(CURDIR)/.provision/tools/bin" $(CARGO) deny --locked check --hide-inclusion-graph bans licenses sources

clean: ## Remove what was built and the links to what was provided
	$(CARGO) clean
	rm -rf .provision
