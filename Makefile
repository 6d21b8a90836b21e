# python3 (3.11 or newer) and make are enough: everything else goes into .venv, pinned and hash-checked.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-postgres test test-all coverage test-lowest test-newest test-extra test-ecosystem test-replay test-canary lint types audit docs build lock bench clean

# Where it is set, each of the hundreds of processes that tests start compiles every module anew.
export PYTHONDONTWRITEBYTECODE :=

# uv installs in seconds what takes pip a minute. To use another index than the public one, set UV_DEFAULT_INDEX.
export UV_SYSTEM_CERTS ?= 1

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv
INTO = $(UV) pip install --quiet --python $(1)/bin/python

help: ## list these targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## run the example service on http://127.0.0.1:8000 (PORT=... for another port)
	@cd examples/service && exec ../../$(RUN) -m service.demo

demo-postgres: $(VENV)/.test ## run the example service on a real PostgreSQL
	@cd examples/service && exec ../../$(RUN) -m service.demo postgresql

# Four processes on two cores, because many tests wait. Of whole systems each class, or file without one, stays in one process,
# which makes its image or its environments once.
PYTEST := -m pytest --numprocesses 4 --dist worksteal
SYSTEMS := -m pytest --numprocesses 4 --dist loadscope --no-loadscope-reorder

test: $(VENV)/.test ## run all tests but those of whole systems, such as images and deployments
	@$(RUN) $(PYTEST) -m 'not system'

test-all: coverage ## run every test, with branch coverage
	@$(RUN) $(SYSTEMS) -m 'system or example'

# The tests that reach every branch. Coverage in greenlets costs a third of the time, so it is on only for the tests in which
# SQLAlchemy switches greenlets; the other tests fail if a greenlet is switched.
COVERED := $(PYTEST) -m 'not system' --cov
IN_GREENLETS := $(wildcard tests/test_database*.py tests/test_doctor*.py tests/test_migration*.py) \
	$(patsubst %,tests/test_%.py,cli testing)

coverage: $(VENV)/.test ## run the library's own tests with branch coverage
	@COVERAGE_CONCURRENCY=thread $(RUN) $(COVERED) --cov-report= --cov-fail-under=0 tests $(IN_GREENLETS:%=--ignore %)
	@$(RUN) $(COVERED) --cov-append --cov-report term-missing:skip-covered --cov-report html $(IN_GREENLETS)

# The suite with other packages than those of requirements/test.txt, each time in an environment of its own. The tests left
# out are about the repository's files, its locks and its demo.
OF_THE_REPOSITORY := benchmarks command_name compose ecs ecs_release ecs_scripts house image new workflows
TESTS ?= tests $(OF_THE_REPOSITORY:%=--ignore tests/test_%.py)
EXAMPLES := examples --ignore examples/service/tests/test_service_demo.py
ELSEWHERE := $(PYTEST) --quiet -p no:cacheprovider $(TESTS)

test-lowest: .venv-lowest/.locked ## run the tests with the lowest versions that pyproject.toml admits
	@$(<D)/bin/python $(ELSEWHERE) $(EXAMPLES)

test-newest: .venv-newest/.upgraded ## run the tests with the newest versions, unless they are those that are locked
	@rm $< # the next run looks again
	@if $(call INTO,$(<D)) --dry-run --offline --no-cache --requirement requirements/test.txt >/dev/null 2>&1; \
		then echo "==> requirements/test.txt has the newest versions: make test runs with them"; \
		else $(<D)/bin/python $(ELSEWHERE) $(EXAMPLES); fi

test-extra: .venv-extra-$(EXTRA) ## run the tests with the extra EXTRA=... alone, or with none
	@$(UV) pip freeze --quiet --python $(RUN) --exclude-editable >$</constraints.txt
	@$(call INTO,$<) --constraint $</constraints.txt --editable '.$(EXTRA:%=[%])' --group pytest --group servers
	@$</bin/python $(ELSEWHERE)

.venv-%/.locked: requirements/%.txt pyproject.toml $(VENV)/.test
	@echo "==> Making $(@D)"
	@$(UV) venv --quiet --clear --python $(RUN) $(@D)
	@$(call INTO,$(@D)) --require-hashes --requirement $<
	@$(call INTO,$(@D)) --no-deps --no-build-isolation --editable .
	@touch $@

test-ecosystem: .venv-ecosystem/.locked ## run the tests with what services run beside FastAPI, such as agents
	@$(<D)/bin/python -m pytest --numprocesses 4 --dist loadfile --quiet -p no:cacheprovider tests/ecosystem

# The packages of .venv serve here, too, where the lock has the same versions: a third of the time.
.venv-ecosystem/.locked .venv-bench/.locked: .venv-%/.locked: requirements/%.txt pyproject.toml $(VENV)/.test
	@echo "==> Making $(@D)"
	@$(UV) venv --quiet --clear --python $(RUN) $(@D)
	@echo "import site; site.addsitedir('$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages)')" \
		>"$$(echo $(@D)/lib/python*/site-packages)/venv.pth"
	@$(call INTO,$(@D)) --require-hashes --requirement $<
	@touch $@

test-replay: .venv-replay/sdists ## run the tests of FastAPI and Starlette with the index of routes, and without
	@$(<D)/bin/python tests/replay/replay.py $<

# Their source packages, whose hashes are in the lock. To download one, pip asks its build backend for its metadata.
.venv-replay/sdists: .venv-replay/.locked tests/replay/replay.py
	@rm -rf $@
	@awk '/^(fastapi|starlette)==/, /[^\\]$$/' requirements/replay.txt >$(@D)/sdists.txt
	@$(RUN) -m pip --python $(@D)/bin/python --quiet download --no-binary :all: --no-deps --no-build-isolation \
		--require-hashes --requirement $(@D)/sdists.txt --dest $@

# `a0` admits pre-releases of these two packages only.
test-canary: | .venv-canary ## run the tests that depend on private parts of FastAPI, with its newest pre-release and Starlette's
	@$(call INTO,$|) --upgrade --editable '.[all]' --group test 'fastapi>=0a0' 'starlette>=0a0'
	@$(UV) pip list --quiet --python $|/bin/python | grep -E '^(fastapi|starlette) '
	@ROUTING_EXAMPLES=300 $|/bin/python $(PYTEST) --quiet -p no:cacheprovider \
		$(wildcard tests/test_routing*.py) $(patsubst %,tests/test_%.py,asgi assembly_lifespans assembly_telemetry body_limit errors)

.venv-newest/.upgraded: | .venv-newest
	@$(call INTO,$(@D)) --upgrade --editable '.[all]' --group test
	@touch $@

.venv-%: $(VENV)/.test
	@echo "==> Making $@"
	@$(UV) venv --quiet --clear --python $(RUN) $@

lint: $(VENV)/.dev ## check style and formatting
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: $(VENV)/.dev ## check types
	@$(RUN) -m mypy

# The packages of the image, and the lowest versions that pyproject.toml admits.
AUDIT := $(UV) tool run --quiet pip-audit==2.10.1 --progress-spinner off --disable-pip --requirement

audit: $(UV) ## find known vulnerabilities in locked packages
	@$(AUDIT) examples/service/requirements.txt
	@$(AUDIT) requirements/lowest.txt

docs: $(VENV)/.dev ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "==> site/index.html"

build: $(VENV)/.dev ## build wheel and sdist into dist/
	@rm -rf dist
	@$(RUN) -m build --no-isolation >/dev/null
	@$(RUN) -m twine check --strict dist/*

bench: .venv-bench/.locked ## measure what everything costs, beside its peers; one part with PART=over_the_wire
	@$(<D)/bin/python benchmarks $(PART)

# Locks hold for every supported Python and platform. dev.txt is solved first; the others agree with it, because they
# may be installed into the same .venv. They keep extras: pip accepts `coverage[toml]` as pinned only with its extra.
LOCK := $(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-strip-extras --no-emit-index-url \
	--no-header --python-version 3.11 --fork-strategy fewest pyproject.toml
AGREE := --constraints requirements/dev.txt

lock: $(UV) ## solve requirements/*.txt anew
	@echo "==> Locking"
	@$(LOCK:pyproject.toml=--group uv) --output-file requirements/uv.txt
	@$(LOCK) --extra all --group dev --output-file requirements/dev.txt
	@$(LOCK) $(AGREE) --extra all --group test --output-file requirements/test.txt
	@$(subst --upgrade,--resolution lowest-direct,$(LOCK)) --extra all --group test --output-file requirements/lowest.txt
	@cp requirements/test.txt requirements/ecosystem.txt # whose versions it prefers, where nothing asks for others
	@$(subst --upgrade,,$(LOCK)) --extra all --group pytest --group ecosystem --output-file requirements/ecosystem.txt
	@cp requirements/test.txt requirements/bench.txt # as above
	@$(subst --upgrade,,$(LOCK)) --extra all --group bench --output-file requirements/bench.txt
	@$(LOCK) $(AGREE) --extra standard --group replay --output-file requirements/replay.txt
	@$(LOCK) $(AGREE) --extra auth --extra cli --extra database --extra standard --group demo --output-file requirements/demo.txt
	@$(LOCK) $(AGREE) --group pytest --output-file requirements/pytest.txt
	@$(LOCK) $(AGREE) --output-file requirements/core.txt
	@$(LOCK) $(AGREE) --extra all --group service --no-emit-package fastapi-prodkit --no-annotate \
		--output-file examples/service/requirements.txt
	@$(LOCK) $(AGREE) --extra all --group service --group examples/service/pyproject.toml:dev \
		--no-emit-package fastapi-prodkit --no-annotate --output-file examples/service/requirements-dev.txt

clean: ## remove everything that was made
	rm -rf $(VENV) .venv-* dist site .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache examples/service/.demo

# Each stamp is newer than its lock, the package's metadata and the interpreter, or its packages are installed again.
$(VENV)/.%: requirements/%.txt pyproject.toml src/fastapi_prodkit/_version.py $(UV)
	@echo "==> Installing requirements/$*.txt ($$(grep -c '^[a-z]' $<) packages)"
	@$(call INTO,$(VENV)) --require-hashes --requirement $<
	@$(call INTO,$(VENV)) --no-deps --no-build-isolation --editable .
	@touch $@

$(UV): requirements/uv.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$$($(PYTHON) --version) is too old: make PYTHON=python3.13 (3.11 or newer) uses another."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv module is missing: apt install python3-venv (Debian, Ubuntu)."; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip --quiet --disable-pip-version-check --no-input install --no-compile --require-hashes --requirement $<
	@touch $@
