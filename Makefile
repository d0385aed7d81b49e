# Every command that a person needs, each one line. The work is in scripts/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo tour test test-long verify fix bench bench-cluster

help: ## Show these commands
	@sed -n 's/^\([a-z-]*\): ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

demo: ## Three brokers in three regions, connectors and applications on this machine, until Ctrl-C
	@scripts/bootstrap
	@scripts/selvedge demo

tour: ## The same without a person: walks every promise, measures it, and fails when one does not hold
	@scripts/bootstrap
	@scripts/selvedge tour

test: ## Every test; says how many ran, were skipped and why
	@scripts/bootstrap
	@scripts/test

test-long: ## Every test, with more seeds, rounds and kills
	@scripts/bootstrap
	@scripts/test --long

verify: ## Format, lints, docs, licences, unused dependencies and tests; changes nothing
	@scripts/bootstrap --verify
	@scripts/verify

fix: ## Rewrite what the formatter and the lints can mend
	@scripts/cargo fmt --all
	@scripts/cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged

bench: ## Measure against what a user would pick instead
	@scripts/bootstrap
	@scripts/cargo build --release --locked -p selvedge -p selvedge-benches
	@scripts/cargo run --release --locked -p selvedge-benches --bin bench

bench-cluster: ## Measure the replicated log against etcd; ARGS="--only commits" for a part, ARGS=--help for more
	@scripts/bootstrap
	@scripts/cargo build --release --locked -p selvedge -p selvedge-benches
	@scripts/cargo run --release --locked -p selvedge-benches --bin bench-cluster -- $(ARGS)
