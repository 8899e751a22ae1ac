"""What SECURITY.md promises about the source: no code from files, no processes, no network but the Hub's, no library from a path."""

import ast
import re
from pathlib import Path

from .source_names import dotted

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ("nodes", "quant", "cuda") for path in (ROOT / room).rglob("*.py"))])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "codeop", "yaml", "imp"}
PROCESSES = {"subprocess", "multiprocessing", "pty", "popen2", "webbrowser"}
NETWORK = {"socket", "ssl", "http", "urllib.request", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"os.system", "os.popen", "os.fork", "os.startfile", "torch.load", "torch.save", "torch.hub", "numpy.load", "np.load", "np.loads",
           "np.fromregex", "torch.jit.load", "torch.package", "torch.utils.cpp_extension"}
WORKER = ROOT / "quant" / "parallel" / "draw.py"  # a program, which imports the pack under its name
COMPILER = ROOT / "cuda" / "compiler.py"  # loads NVRTC from the folders of the installed packages
# The processes of a run on several GPUs, which a user starts: from the command line, or with the node SVDQuant Several GPUs.
RUNS = ROOT / "quant" / "parallel", ROOT / "quant" / "batch"
OF_RUNS = {"subprocess", "socket", "pickle"}  # pickle for what these processes send each other, and never for a file
STARTS = re.compile(r"os\.(spawn|exec|posix_spawn)")


def imported(tree):
    """Absolute names of the modules that a source imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def forbidden(path, modules):
    """`modules` without those that a source may import."""
    return modules - OF_RUNS if path.parent in RUNS else modules


def calls(tree):
    return [(dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_runs_code_from_data_or_starts_a_process():
    for path, tree in TREES.items():
        assert [name for name in imported(tree) if within(name, forbidden(path, CODE | PROCESSES))] == [], path
        found = [name for name, _ in calls(tree)]
        assert [name for name in found if name in BUILTINS or within(name, METHODS) or STARTS.match(name)] == [], path


def test_only_the_download_reaches_the_network_and_only_through_the_hubs_client():
    for path, tree in TREES.items():
        names = list(imported(tree))
        assert [name for name in names if within(name, forbidden(path, NETWORK))] == [], path
        assert not any(within(name, {"huggingface_hub"}) for name in names) or path == ROOT / "quant" / "download" / "hub.py", path


def test_processes_of_a_run_meet_on_this_machine_alone():
    """torch.distributed's store takes an address; torchrun gives its own."""
    stores = [(path, call) for path, tree in TREES.items() for name, call in calls(tree) if name.endswith("TCPStore")]
    assert stores and all(call.args[0].value == "127.0.0.1" for _, call in stores)
    pickles = [name for path in TREES for name, _ in calls(TREES[path]) if re.match(r"pickle\.(loads?|Unpickler)$", name)]
    assert pickles == [], "only the class that a message's bytes go through may unpickle"


def test_modules_and_libraries_have_names_of_the_source():
    """A name that comes from a file, or a folder that others can write to, would load somebody else's code."""
    for path, tree in TREES.items():
        for name, call in calls(tree):
            place = f"{path}, line {call.lineno}"
            if name.endswith("import_module") and path.parent != ROOT:
                assert is_relative(call.args[0]) and len(call.args) == 2 or path == WORKER, place
            if name.startswith("ctypes.") and name.endswith("DLL"):
                assert path == COMPILER or not any(isinstance(node, ast.Call) for node in ast.walk(call.args[0])), place
            if name.endswith("load_torch_file"):
                assert [word.arg for word in call.keywords if word.arg == "safe_load" and word.value.value is True], place


def is_relative(name):
    """Whether the name of a module begins with a dot, so that it is one of the pack's own."""
    first = name.values[0] if isinstance(name, ast.JoinedStr) else name
    return isinstance(first, ast.Constant) and first.value.startswith(".")


def test_the_check_finds_what_it_forbids():
    bad = ast.parse("import subprocess\nfrom os import path\nfrom urllib import request\nos.execv('x')\nx = eval('1')\ntorch.load('f')")
    names = list(imported(bad))
    assert [name for name in names if within(name, CODE | PROCESSES | NETWORK)] == ["subprocess", "urllib.request"]
    found = [name for name, _ in calls(bad)]
    assert [name for name in found if name in BUILTINS or within(name, METHODS) or STARTS.match(name)] == ["os.execv", "eval", "torch.load"]


def test_the_promises_name_tests_that_exist():
    for name in re.findall(r"`((?:tests/)?\S*test_\w+\.py)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or list((ROOT / "tests").rglob(name)), name
