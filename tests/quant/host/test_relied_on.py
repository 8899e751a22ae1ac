"""The list of what the pack takes of ComfyUI: it is whole, this ComfyUI has all of it, and what one lacks is told in a sentence."""

import ast
import asyncio
import importlib
import inspect
import logging
import re
from collections import defaultdict
from pathlib import Path

import comfy.model_patcher
import comfy.options
import comfy.samplers
import comfy.sd
import comfy.utils
import comfyui_svdquant
import comfyui_version
import pytest
import torch
from comfyui_svdquant.nodes import compare_models
from comfyui_svdquant.nodes.several_gpus import SVDQuantSeveralGPUs
from comfyui_svdquant.quant.host import relied_on
from comfyui_svdquant.quant.host.patcher import SVDQuantModelPatcher

from ...source_names import dotted

ROOT = Path(__file__).resolve().parents[3]
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for room in ("nodes", "quant") for path in (ROOT / room).rglob("*.py")}
HOSTS = ("comfy", "comfy_execution", "comfyui_version", "execution", "folder_paths", "latent_preview", "node_helpers", "server")
LISTED = {name.replace(":", ".") for names in (relied_on.NAMES, relied_on.SERVER, *relied_on.FEATURES.values()) for name in names}


def used(tree):
    """The whole names in a source that begin in one of ComfyUI's modules."""
    names, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in HOSTS:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= set(names.values())
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0]: alias.name.partition(".")[0] for alias in node.names
                      if alias.name.partition(".")[0] in HOSTS}
    for node in ast.walk(tree):
        first, _, rest = dotted(node).partition(".")
        if rest and first in names:
            found.add(f"{names[first]}.{rest}")
    return found


def is_listed(name):
    """Whether the list has a name, or one that it is the beginning of, or an attribute of a listed object."""
    return any(name == listed or listed.startswith(f"{name}.") or name.startswith(f"{listed}.") for listed in LISTED)


def test_every_name_of_comfyuis_that_the_pack_uses_is_on_the_list():
    found = set().union(*map(used, SOURCES.values()))
    assert len(found) > 40
    assert {name for name in found if not name.startswith("server.PromptServer") and not is_listed(name)} == set()


def test_the_list_has_no_name_that_nothing_uses():
    text = " ".join(ast.unparse(tree) for path, tree in SOURCES.items() if path.name != "relied_on.py")
    last = [name.rpartition(".")[2] for name in (*LISTED, *(name for names in relied_on.ATTRIBUTES.values() for name in names))]
    assert [name for name in last if name not in text] == []


def test_every_override_is_on_the_list():
    host = comfy.model_patcher.ModelPatcher
    overridden = {name for name, member in vars(SVDQuantModelPatcher).items() if callable(member) and hasattr(host, name)}
    assert overridden == set(relied_on.OVERRIDES)


def test_every_attribute_of_comfyuis_patcher_is_on_the_list():
    [cls] = [node for node in SOURCES[ROOT / "quant" / "host" / "patcher.py"].body if isinstance(node, ast.ClassDef)]
    own = {*vars(SVDQuantModelPatcher), "hook_notes", "keeps_device", "logged"}
    attributes = {(dotted(node.value), node.attr) for node in ast.walk(cls) if isinstance(node, ast.Attribute)}
    used = {name for owner, name in attributes if owner == "self"} - own
    used |= {name for owner, name in attributes if owner in ("self.model", "model") and not name.startswith("svdquant_")
             and not hasattr(torch.nn.Module, name)}
    listed = {name for names in relied_on.ATTRIBUTES.values() for name in names}
    assert used - listed == set() and len(used) > 20


def test_this_comfyui_has_all_of_it(caplog):
    caplog.set_level(logging.WARNING)
    relied_on.check()
    assert not caplog.records


def refused(match):
    """The extension is not made, and no node is registered."""
    with pytest.raises(relied_on.HostError, match=match) as caught:
        asyncio.run(comfyui_svdquant.comfy_entrypoint())
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and "ComfyUI-SVDQuant needs; update " in message
    return message


def test_a_name_that_has_moved_is_told(monkeypatch):
    monkeypatch.delattr(comfy.utils, "get_attr")
    monkeypatch.setattr(comfyui_version, "__version__", "0.48.1")
    assert refused("^ComfyUI 0.48.1 no longer has comfy.utils.get_attr, which this").endswith(
        "update ComfyUI-SVDQuant, or go back to the previous version of ComfyUI.")


def test_a_comfyui_that_is_too_old_is_told_so(monkeypatch):
    monkeypatch.delattr(comfy.utils, "get_attr")
    monkeypatch.setattr(comfyui_version, "__version__", "0.3.40")
    assert refused("no longer has comfy.utils.get_attr").endswith("needs; update ComfyUI.")


def test_many_names_make_a_short_sentence(monkeypatch):
    for name in ("get_attr", "set_attr_param", "copy_to_param", "load_torch_file", "ProgressBar"):
        monkeypatch.delattr(comfy.utils, name)
    refused("no longer has comfy.utils.ProgressBar, comfy.utils.copy_to_param, comfy.utils.get_attr and 2 more, which")


@pytest.mark.parametrize("method", ["load", "_load_list", "partially_load", "patch_hook_weight_to_device"])
def test_an_override_of_a_method_that_is_gone_is_told(monkeypatch, method):
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, method)
    refused(rf"no longer has comfy.model_patcher.ModelPatcher.{method}")


def test_an_attribute_that_the_patcher_no_longer_has_is_told(monkeypatch):
    words = relied_on.words
    monkeypatch.setattr(relied_on, "words", lambda module: words(module) - {"model_lowvram"})
    refused("no longer has comfy.model_patcher.model_lowvram, ")


def test_a_module_without_a_source_is_not_searched(monkeypatch):
    def getsource(module):
        raise OSError("could not get source code")

    monkeypatch.setattr(relied_on.inspect, "getsource", getsource)
    assert relied_on.missing_attributes() == []


ALONE = {relied_on.COMMAND_LINE: {"quant/host/conditioning.py", "quant/host/offline.py", "quant/parallel/entry.py"},
         relied_on.SEVERAL_GPUS: {"quant/host/several_gpus.py", "quant/parallel/entry.py"},
         relied_on.COMPARE_MODELS: {"nodes/compare_models.py", "quant/host/drawing.py"}}


def test_a_feature_has_the_names_that_it_alone_uses():
    places = defaultdict(set)
    for path, tree in SOURCES.items():
        for name in used(tree):
            places[name].add(path.relative_to(ROOT).as_posix())
    of_all = {name.replace(":", ".") for name in (*relied_on.NAMES, *relied_on.SERVER)}
    for feature, files in ALONE.items():
        own = {name for name, where in places.items() if where <= files and is_listed(name) and name.count(".") > 1}
        listed = {name.replace(":", ".") for name in relied_on.FEATURES[feature]}
        assert {name for name in own if not any(other.startswith(f"{name}.") for other in LISTED)} <= listed
        assert not listed & of_all


def place(owner):
    """The whole name of a module or a class."""
    return owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"


@pytest.mark.parametrize(("feature", "module", "name"), [
    (relied_on.COMMAND_LINE, comfy.sd, "load_lora_for_models"), (relied_on.SEVERAL_GPUS, comfy.options, "args_parsing"),
    (relied_on.COMPARE_MODELS, comfy.samplers.KSampler, "SCHEDULERS")])
def test_a_feature_alone_is_refused(monkeypatch, feature, module, name):
    monkeypatch.delattr(module, name)
    monkeypatch.setattr(comfyui_version, "__version__", "0.48.1")
    asyncio.run(comfyui_svdquant.comfy_entrypoint())
    with pytest.raises(relied_on.HostError) as caught:
        relied_on.check_feature(feature)
    assert str(caught.value) == (f"ComfyUI 0.48.1 no longer has {place(module)}.{name}, which {feature} of this version of "
                                 "ComfyUI-SVDQuant needs; update ComfyUI-SVDQuant, or go back to the previous version of ComfyUI.")
    for other in relied_on.FEATURES.keys() - {feature}:
        relied_on.check_feature(other)


def test_several_gpus_is_refused_before_it_starts_processes(monkeypatch):
    monkeypatch.delattr(comfy.options, "args_parsing")
    with pytest.raises(relied_on.HostError, match="which SVDQuant Several GPUs of this version"):
        SVDQuantSeveralGPUs.execute(None, 2)


def test_compare_models_is_there_without_the_lists_of_samplers_and_says_so(monkeypatch):
    says = r"^ComfyUI \S+ no longer has comfy.samplers.KSampler.SAMPLERS, which SVDQuant Compare Models of this version"
    with monkeypatch.context() as patch:
        patch.delattr(comfy.samplers.KSampler, "SAMPLERS")
        importlib.reload(compare_models)
        entries = {entry.id: entry for entry in compare_models.SVDQuantCompareModels.define_schema().inputs}
        assert entries["sampler_name"].options == ["euler"] and len(entries["scheduler"].options) > 1
        assert re.search(says, compare_models.SVDQuantCompareModels.validate_inputs(sampler_name="ddim", cfg=1.0))
        with pytest.raises(relied_on.HostError, match=says):
            compare_models.check_inputs("euler", "simple", 1.0, False)
    importlib.reload(compare_models)


def of_comfyui(function):
    function.__module__ = "comfy.model_patcher"
    return function


def test_a_method_that_another_pack_has_replaced_is_not_compared(monkeypatch, caplog):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda *args, **kwargs: None)
    asyncio.run(comfyui_svdquant.comfy_entrypoint())
    assert not caplog.records


@pytest.mark.parametrize(("changed", "says"), [
    (lambda self, device_to=None, budget=0, force_patch_weights=False, full_load=False: None, "lowvram_model_memory is gone"),
    (lambda self, device_to, lowvram_model_memory, force_patch_weights, full_load, more: None, "more is new"),
    (lambda self, lowvram_model_memory=0, device_to=None, force_patch_weights=False, full_load=False: None, "its parameters are lowvram_"),
])
def test_another_signature_is_told(monkeypatch, changed, says):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", of_comfyui(changed))
    refused(rf"has changed ModelPatcher.load \({says}")


def test_a_new_parameter_that_can_be_left_out_is_a_warning(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", of_comfyui(lambda self, device_to=None, lowvram_model_memory=0,
                        force_patch_weights=False, full_load=False, dirty=False: None))
    asyncio.run(comfyui_svdquant.comfy_entrypoint())
    [record] = caplog.records
    assert "has added dirty to ModelPatcher.load, which" in record.getMessage()


def test_an_override_that_passes_everything_on_takes_any_signature():
    assert relied_on.differences(lambda self, key, new, newer=1: None, lambda self, key, *args, **kwargs: None) == ([], [])
