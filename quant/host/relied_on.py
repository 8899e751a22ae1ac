"""What this pack takes of ComfyUI beyond its public node API: one list, compared with the ComfyUI at hand before any of it is imported.

ComfyUI moves these from version to version. A name that is gone would otherwise end a run in a traceback hours later, or the pack's import
in one that names no remedy.
"""

import inspect
import logging
import re
from pkgutil import resolve_name

log = logging.getLogger(__name__)

OLDEST = (0, 3, 75)
PATCHER = "comfy.model_patcher:ModelPatcher"
# Modules, and names in them.
NAMES = (
    "comfy.hooks:EnumHookMode.MaxSpeed",
    "comfy.lora:calculate_weight",
    "comfy.model_detection:convert_diffusers_mmdit", "comfy.model_detection:detect_unet_config",
    "comfy.model_detection:model_config_from_unet_config",
    "comfy.model_management:InterruptProcessingException", "comfy.model_management:MAX_PINNED_MEMORY",
    "comfy.model_management:extra_reserved_memory", "comfy.model_management:free_memory",
    "comfy.model_management:get_free_memory", "comfy.model_management:get_torch_device",
    "comfy.model_management:get_total_memory", "comfy.model_management:load_models_gpu", "comfy.model_management:pin_memory",
    "comfy.model_management:throw_exception_if_processing_interrupted", "comfy.model_management:unet_dtype",
    "comfy.model_management:unet_manual_cast", "comfy.model_management:unet_offload_device", "comfy.model_management:unpin_memory",
    PATCHER, "comfy.model_patcher:LowVramPatch", "comfy.model_patcher:get_key_weight",
    "comfy.ops:CastWeightBiasOp", "comfy.ops:disable_weight_init", "comfy.ops:manual_cast", "comfy.ops:run_every_op",
    "comfy.patcher_extension:CallbacksMP.ON_LOAD", "comfy.patcher_extension:WrappersMP.APPLY_MODEL",
    "comfy.quant_ops:QUANT_ALGOS",
    "comfy.sample:fix_empty_latent_channels", "comfy.sample:prepare_noise", "comfy.sample:sample",
    "comfy.sd1_clip:SDClipModel", "comfy.sd:CLIP", "comfy.sd:CLIPType.STABLE_DIFFUSION", "comfy.sd:detect_te_model", "comfy.sd:load_clip",
    "comfy.sd:load_diffusion_model", "comfy.sd:load_text_encoder_state_dicts",
    "comfy.utils:DISABLE_MMAP", "comfy.utils:ProgressBar", "comfy.utils:copy_to_param", "comfy.utils:get_attr",
    "comfy.utils:load_torch_file", "comfy.utils:set_attr", "comfy.utils:set_attr_param",
    "comfy.weight_adapter:WeightAdapterBase",
    "comfyui_version:__version__",
    "folder_paths:get_filename_list", "folder_paths:get_folder_paths", "folder_paths:get_full_path", "folder_paths:get_output_directory",
    "folder_paths:get_temp_directory",
)
# Names that the nodes take; quantize.py runs without a server.
SERVER = ("nodes:CLIPLoader.INPUT_TYPES", "nodes:DualCLIPLoader.INPUT_TYPES", "server:PromptServer.send_progress_text")
COMMAND_LINE, SEVERAL_GPUS, COMPARE_MODELS = "quantize.py", "SVDQuant Several GPUs", "SVDQuant Compare Models"
SAMPLERS, SCHEDULERS = "comfy.samplers:KSampler.SAMPLERS", "comfy.samplers:KSampler.SCHEDULERS"
# Names that one feature alone takes, which is refused where a ComfyUI lacks them, while the rest of the pack works.
FEATURES = {
    COMMAND_LINE: ("comfy.model_management:soft_empty_cache", "comfy.model_management:unload_all_models",
                   "comfy.options:enable_args_parsing", "comfy.sd:load_lora_for_models"),
    SEVERAL_GPUS: ("comfy.options:args_parsing", "comfy.options:enable_args_parsing",
                   "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL"),
    COMPARE_MODELS: (SAMPLERS, SCHEDULERS),
}
# {module: names in its source: of methods, of attributes of its objects, and of those that it sets on models}.
ATTRIBUTES = {
    "comfy.model_patcher": (
        "additional_models", "attachments", "backup", "cached_hook_patches", "cached_patcher_init", "callbacks", "comfy_cast_weights",
        "comfy_patched_weights", "current_hooks", "current_patcher", "current_weight_patches_uuid", "detach", "device",
        "force_cast_weights", "forced_hooks", "get_all_callbacks", "get_attachment", "get_model_object", "hook_backup", "hook_mode",
        "hook_patches", "injections", "inplace_update", "load_device", "model", "model_loaded_weight_memory", "model_lowvram",
        "model_options", "object_patches", "object_patches_backup", "offload_device", "patches", "patches_uuid", "pinned",
        "set_attachments", "set_model_compute_dtype", "size", "weight", "weight_wrapper_patches", "wrappers"),
    "comfy.model_base": ("diffusion_model", "get_dtype", "model_config", "state_dict_for_saving"),
    "comfy.ops": ("comfy_cast_weights", "weight_function", "bias_function"),
}
# Newer versions have these, and older ones do without.
NEWER = {"cached_patcher_init"}
# The methods of PATCHER that SVDQuantModelPatcher overrides.
OVERRIDES = (
    "__del__", "__init__", "_load_list", "add_hook_patches", "add_patches", "add_weight_wrapper", "clone", "get_key_patches", "load",
    "model_size", "model_state_dict", "partially_load", "partially_unload", "patch_cached_hook_weights", "patch_hook_weight_to_device",
    "patch_hooks", "patch_weight_to_device", "pin_weight_to_device", "unpatch_hooks", "unpatch_model", "unpin_weight",
)


class HostError(ImportError):
    """This ComfyUI lacks what the pack needs. The message is one sentence, which ComfyUI logs in place of the nodes."""


def check(in_server=True):
    """Raise HostError unless this ComfyUI has everything on the lists above, with the parameters that this pack's overrides have. It logs
    a warning for each parameter that an override doesn't know yet and that ComfyUI can leave out. Functions that another node pack has put
    in the place of ComfyUI's are not compared: they pass on what they get. in_server: whether ComfyUI's server runs in this process."""
    if lacking := [*missing_names(in_server), *missing_attributes()]:
        raise HostError(_sentence(_lacks(lacking)))
    from .patcher import SVDQuantModelPatcher  # it imports the names that were just found

    host = resolve_name(PATCHER)
    for method in OVERRIDES:
        function = getattr(host, method)
        if not function.__module__.startswith("comfy."):
            continue
        refused, unknown = differences(function, vars(SVDQuantModelPatcher)[method])
        if refused:
            raise HostError(_sentence(f"has changed ModelPatcher.{method} ({', '.join(refused)})"))
        if unknown:
            log.warning("ComfyUI %s has added %s to ModelPatcher.%s, which this version of ComfyUI-SVDQuant does not know; if a run stops "
                        "there, update ComfyUI-SVDQuant.", _version(), ", ".join(unknown), method)


def check_feature(feature):
    """Raise HostError if this ComfyUI lacks a name that the feature, a key of FEATURES, takes."""
    if lacking := sorted(_dotted(name) for name in FEATURES[feature] if not _exists(name)):
        raise HostError(_sentence(_lacks(lacking), feature))


def found(name, otherwise):
    """The object of a feature's name; `otherwise`, where this ComfyUI lacks it and check_feature will say so."""
    return resolve_name(name) if _exists(name) else otherwise


def missing_names(in_server=True):
    """Those of NAMES and OVERRIDES, and SERVER, that this ComfyUI does not have, as a.b.c."""
    methods = [f"{PATCHER}.{method}" for method in OVERRIDES]
    return [_dotted(name) for name in (*NAMES, *(SERVER if in_server else ()), *ATTRIBUTES, *methods) if not _exists(name)]


def missing_attributes():
    """Those of ATTRIBUTES that do not occur in the source of their module, as a.b.c."""
    return [f"{module}.{attribute}" for module, attributes in ATTRIBUTES.items() for attribute in attributes
            if attribute not in NEWER | words(module)]


def differences(host, ours):
    """(calls that `ours` would refuse or get refused, as texts; optional parameters of the host's that `ours` does not take).

    host: the host's function; ours: the one that overrides it and calls it with its own parameters.
    """
    theirs, own = (list(inspect.signature(function).parameters.values())[1:] for function in (host, ours))
    kinds = {parameter.kind for parameter in own}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        own, open_ended = [parameter for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD], True
    else:
        open_ended = False
    names, own_names = [parameter.name for parameter in theirs], [parameter.name for parameter in own]
    refused = [f"{name} is gone" for name in own_names if name not in names]
    if not refused and names[:len(own_names)] != own_names:
        refused = [f"its parameters are {', '.join(names)}"]
    more = [] if open_ended else theirs[len(own):]
    refused += [f"{parameter.name} is new" for parameter in more if _is_required(parameter)]
    return refused, [parameter.name for parameter in more if not _is_required(parameter)]


def words(module):
    """The words in the source of a module; everything, if it has none that can be read. Not the attributes of its classes: another node
    pack may have replaced the methods that use them."""
    try:
        return set(re.findall(r"\w+", inspect.getsource(resolve_name(module))))
    except OSError:
        return {name for names in ATTRIBUTES.values() for name in names}


def _exists(name):
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _is_required(parameter):
    return parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _version():
    return resolve_name("comfyui_version:__version__") if _exists("comfyui_version:__version__") else "of an unknown version"


def _dotted(name):
    return name.replace(":", ".")


def _lacks(names):
    return f"no longer has {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")


def _sentence(what, feature="ComfyUI-SVDQuant"):
    """The message of a HostError. what: what this ComfyUI has changed, as the rest of a sentence; feature: what needs it."""
    numbers = tuple(int(part) for part in _version().split(".")[:3] if part.isdecimal())
    remedy = "update ComfyUI" if numbers and numbers < OLDEST else "update ComfyUI-SVDQuant, or go back to the previous version of ComfyUI"
    needs = f"this version of {feature}" if feature == "ComfyUI-SVDQuant" else f"{feature} of this version of ComfyUI-SVDQuant"
    return f"ComfyUI {_version()} {what}, which {needs} needs; {remedy}."
