# make demo    set up a ComfyUI from nothing, run our workflow in it, leave demo/out/contact_sheet.png
# make serve   the same ComfyUI, left running with the workflow in the browser
# make test    the whole test suite;  make test ARGS="tests/quant -k layout" for a part of it
# make lint    ruff
# make clean   remove what the others set up and made
#
# Each is one line of plain Python, for machines without make. COMFYUI_PATH chooses another ComfyUI, COMFYUI_NEWER_PATH names
# a newer one that the tests start as well: see demo/host/setup.py.

PYTHON ?= python3
ARGS ?=

.PHONY: demo serve test lint clean

demo:
	$(PYTHON) demo/run.py

serve:
	$(PYTHON) demo/run.py --serve

test:
	$(PYTHON) demo/host/setup.py -m pytest -n auto --dist loadfile $(ARGS)

lint:
	$(PYTHON) demo/host/setup.py -m ruff check

clean:
	rm -rf .venv .comfyui demo/out
