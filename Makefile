# Run `make` alone to see these commands. They need Python 3.10 or newer and access to Python packages.
#
#     make quickstart      # a small GPT learns Python in a few minutes on this machine, then writes some
#     make install         # creates .venv and installs requirements.txt into it
#     make test            # runs the tests
#     make torture         # runs the long tests: runs that are killed, restarted and cut off many times
#     make clean           # removes .venv, and nothing that was trained

PYTHON ?= python3
BIN := .venv/bin
STDLIB = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

.PHONY: help quickstart install test torture clean

help:
	@sed -n 's/^#     //p' Makefile

quickstart: $(BIN)/installed
	@echo "== 1/3  shards: the source of Python's standard library, in 4,096 tokens learned from it"
	@$(BIN)/python prepare.py "$(STDLIB)" --out shards/stdlib --tokenizer 4096 --glob '*.py' \
		--exclude site-packages --exclude dist-packages --exclude test --exclude tests --exclude idle_test \
		--exclude encodings
	@echo "== 2/3  training: config/quickstart.py"
	@$(BIN)/python train.py config/quickstart.py
	@echo "== 3/3  what it writes after 'def main(', 'class Queue:' and 'import os, sys'"
	@$(BIN)/python sample.py --model out/quickstart -p "def main(" -p "class Queue:" -p "import os, sys" \
		-m 200 --temperature 0.8 --top_p 0.9
	@echo "== next:"
	@echo "source .venv/bin/activate"
	@echo "python sample.py 'class Stack:' -n 3      # continue a text of your own"
	@echo "python sample.py --web                    # open the address it prints: see how it learned"
	@echo "# the same with a folder of your own texts, in any language:"
	@echo "python prepare.py my_texts/ --out shards/anytext --tokenizer 2048"
	@echo "python train.py config/anytext.py"

install: $(BIN)/installed
	@echo "== installed; next: source .venv/bin/activate"

test: $(BIN)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

torture: $(BIN)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m torture

# Installs again when requirements.txt changes.
$(BIN)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== installing requirements.txt into .venv: a minute or two with a fast network"
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv
