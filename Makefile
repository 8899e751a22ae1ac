# make demo    set up a ComfyUI, run the demo's workflow in it, write demo/out/contact_sheet.png
# make serve   the same ComfyUI, left running; the workflow opens in the browser, or the terminal says that there is none
# make test    the whole test suite;  make test ARGS="tests/quant -k layout" for a part of it
# make lint    ruff
# make clean   remove everything that the other targets made
#
# Without make, each target can be run as its one line of Python. COMFYUI_PATH selects another ComfyUI, COMFYUI_NEWER_PATH a newer one
# that the tests also start; see demo/host/setup.py.

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
