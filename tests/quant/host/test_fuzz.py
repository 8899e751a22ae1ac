"""Quantized files with false headers or bodies that do not fit, opened as SVDQuant Load Model opens them. The result is an error of one
sentence, or a model with every tensor as the file describes it. Nothing is allocated for missing data."""

import json
import os
import resource

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import checksums, convert, inspection, native
from comfyui_svdquant.quant.checkpoint.header import DTYPES, CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.checkpoint.write import DTYPE_NAMES
from comfyui_svdquant.quant.families import TITLES
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import build, loader
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ..foreign_models import FOREIGN
from ..packed_flux import packed_flux
from ..random_chroma import chroma_tensors
from ..random_flux import flux_shapes

pytestmark = [pytest.mark.usefixtures("inference_mode"), pytest.mark.timeout(1500)]

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DESCRIPTION = ".comfy_quant"
FACTORS = (".weight_smooth_factor", ".smooth")
PREFIX = "model.diffusion_model."
GIGABYTES = 10**11  # 100 of them
QKV, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"
FORMS = ("native", "kitchen", "listed", "nunchaku", "plain", "chroma", "diffusers")
FLUX = flux_shapes(hidden=128, depth_single=1)
DIFFUSERS = FAMILY.diffusers.tensors(FAMILY.configuration.of(FLUX))
NEEDED = 12 * 4 + 3 * 4 + 6 + 20  # tensors of Nunchaku's file: its linears, modulation layers, norms and the rest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model in each supported form, as {form: (entries, metadata)} of its header."""
    folder, model = tmp_path_factory.mktemp("models"), packed_flux()
    scale = model[0][f"{QKV}.weight_scale"]  # one layer of free scales beside those of integers
    scale += torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)).mul(scale).to(scale.dtype)
    native.save(str(folder / "native"), *model, {"preset": "data-free"}, "flux")
    nunchaku_writer.save(str(folder / "nunchaku"), *model, {"preset": "data-free"}, "flux")
    headers = {form: read_header(str(folder / form)) for form in ("native", "nunchaku")}
    forms = {form: ({name: entry(header, name) for name, info in header.tensors.items()}, header.metadata)
             for form, header in headers.items()}
    for _, metadata in forms.values():
        del metadata[checksums.KEY]  # of other data
    tensors, metadata = forms["native"]
    forms["kitchen"] = {PREFIX + name: value for name, value in tensors.items()}, {}
    layers = {name.removesuffix(DESCRIPTION): json.loads(value[2]) for name, value in tensors.items() if name.endswith(DESCRIPTION)}
    forms["listed"] = ({name: value for name, value in tensors.items() if not name.endswith(DESCRIPTION)},
                       {"_quantization_metadata": json.dumps({"layers": layers})})
    chroma = {name: tuple(tensor.shape) for name, tensor in chroma_tensors(hidden=128, depth_single=1).items()}
    for form, shapes in (("plain", FLUX), ("chroma", chroma), ("diffusers", DIFFUSERS)):
        forms[form] = {name: ["BF16", list(shape), None] for name, shape in shapes.items()}, {"format": "pt"}
    return forms


def entry(header, name):
    """[dtype, shape, bytes or None for a hole] of a tensor. Only the bytes that readers use before the weights are kept."""
    info = header.tensors[name]
    return [DTYPE_NAMES[info.dtype], list(info.shape), header.read_bytes(name) if name.endswith(DESCRIPTION) else None]


def write(path, entries, metadata, lie=lambda header, size: size):
    """A file of these entries. The data are a hole of the right size, but for smoothing factors, which are positive. lie(header, size) may
    change both first."""
    header, position = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in entries.items():
        count = len(data) if data is not None else torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [count] if data is not None else list(shape), "data_offsets": [position, position + count]}
        position += count
    placed = {name: value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"}
    size = min(lie(header, position), 10 * GIGABYTES)  # the largest hole of file systems
    raw = json.dumps(header).encode()
    path.unlink(missing_ok=True)  # a model of the previous example may still map it
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)
        for name, (dtype, shape, data) in entries.items():
            count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
            if data is None and name.endswith(FACTORS) and count < 100_000:
                data = (b"\x80\x3f" * count)[:count]  # ones in bf16, and positive in the other types
            if data is not None and placed[name] + len(data) <= size:
                file.seek(8 + len(raw) + placed[name])
                file.write(data)
    return path


def opened(path):
    """The state dict of the loaded model, or None if the file is refused in one sentence."""
    try:
        model = loader.load_model(str(path)).model
    except CheckpointError as error:
        message = str(error)
        assert path.name in message and "\n" not in message and message.endswith((".", ").")), message
        return None
    return {build.stored_name(model, name): tensor for name, tensor in model.diffusion_model.state_dict().items()}


def agrees(state, entries, form):
    """Whether a loaded model has exactly the file's tensors."""
    if form == "nunchaku":  # under other names and in another order; test_nunchaku.py compares the shapes
        needed = {name for name in entries if not name.endswith((".smooth_orig", ".lora_down", ".lora_up"))}
        return len(needed) == NEEDED
    if form == "diffusers":  # ComfyUI joins some of them; test_diffusers.py compares the models
        return entries.keys() == DIFFUSERS.keys()
    within = PREFIX if form == "kitchen" else ""  # other tensors, as in a whole checkpoint, aren't the model's
    stored = {name.removeprefix(within): value for name, value in entries.items()
              if name.startswith(within) and not name.endswith(DESCRIPTION)}
    for name in [name for name, value in stored.items() if name.endswith(".weight_scale") and value[0] == "I8"]:
        stored[name] = [stored.pop(f"{name}_2")[0], *stored[name][1:]]
    own = form != "plain"  # ComfyUI's loader reads a plain file, and newer ones read it in another type on a CPU
    return state.keys() == stored.keys() and all(
        list(tensor.shape) == stored[name][1] and (not own or tensor.dtype == DTYPES[stored[name][0]]) for name, tensor in state.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_files_themselves_are_read(files, tmp_path, form):
    entries, metadata = files[form]
    state = opened(write(tmp_path / "good.safetensors", entries, metadata))
    assert state is not None and agrees(state, entries, form)


# --- one lie at a time ---------------------------------------------------------------------------------------------


def grow(header, size):
    header[f"{QKV}.weight"]["shape"][0] = GIGABYTES
    return size


def far_away(header, size):
    header[f"{QKV}.weight"]["data_offsets"] = [GIGABYTES, GIGABYTES + 384 * 64]
    return size


def overlap(header, size):
    header[f"{QKV}.weight_scale"]["data_offsets"] = header["single_blocks.0.linear1.bias"]["data_offsets"]
    return size


def unknown(header, size):
    header[f"{QKV}.weight"]["dtype"] = "F4_E2M1"
    return size


@pytest.mark.parametrize(("lie", "says"), [
    (grow, f"declares tensor {QKV}.weight as I8 [100000000000, 64]"), (far_away, "cut off"), (overlap, f"tensor {QKV}.weight_scale"),
    (unknown, "stores tensor double_blocks.0.img_attn.qkv.weight as 'F4_E2M1'"), (lambda header, size: size - 1, "cut off"),
    (lambda header, size: size + 1, "end at byte"),
])
def test_headers_that_do_not_fit_their_file(files, tmp_path, lie, says):
    path = write(tmp_path / "bad.safetensors", *files["native"], lie)
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    assert says in str(caught.value) and "bad.safetensors" in str(caught.value)


def put(name, index, value):
    return lambda entries: entries[name].__setitem__(index, value)


def describe(layer, **changes):
    def change(entries):
        conf = json.loads(entries[layer + DESCRIPTION][2])
        entries[layer + DESCRIPTION][2] = json.dumps(conf | changes).encode()
    return change


@pytest.mark.parametrize(("change", "says"), [
    (put(f"{QKV}.weight", 0, "F8_E4M3"), "torch.float8_e4m3fn instead of torch.int8"),
    (put(f"{QKV}.weight_scale", 0, "F8_E4M3"), "has scales of type torch.float8_e4m3fn"),
    (put("img_in.weight", 0, "I8"), "tensor img_in.weight is torch.int8 instead of a floating point type"),
    (put(f"{QKV}.weight_proj_up", 1, [384, 32]), f"tensor {QKV}.weight_proj_up has shape [384, 32] instead of [384, 16]"),
    (put(f"{QKV}.weight", 1, [512, 64]), f"tensor {QKV}.weight_scale has shape [2, 384] instead of [2, 512]"),
    (put("final_layer.linear.weight", 1, [64, 64]), "final_layer.linear.weight has shape [64, 64] instead of [64, 128]"),
    (lambda entries: entries.pop(f"{QKV}.weight_scale"), f"lacks tensor {QKV}.weight_scale"),
    (lambda entries: entries.pop(f"{QKV}.bias"), f"lacks tensor {QKV}.bias"),
    (lambda entries: entries.pop(QKV + DESCRIPTION), f"{QKV}.weight"),
    (lambda entries: entries.pop("img_in.weight"), "img_in.weight"),
    (lambda entries: entries.pop("single_blocks.0.norm.key_norm.scale"), "lacks tensor single_blocks.0.norm.key_norm"),
    (lambda entries: entries.update({"double_blocks.7.img_attn.qkv.weight": ["BF16", [384, 128], None]}),
     "tensor double_blocks.7.img_attn.qkv.weight"),
    (lambda entries: entries.update({"lora_a.weight": ["BF16", [1], None]}), "has tensor lora_a.weight"),
    (lambda entries: entries.update({f"{QKV}.qweight": ["I8", [1], None]}), f"{QKV}.qweight"),
    (describe(QKV, rank=32), "instead of [128, 32]"), (describe(QKV, rank="16"), "lacks a valid rank"),
    (describe(QKV, rank=True), "lacks a valid rank"),
    (describe(QKV, format="float8_e4m3fn"), f"layer {QKV} has format 'float8_e4m3fn'"),
    (describe(QKV, format="awq_w4a16"), f"lacks tensor {QKV}.weight_zeros"),
    (describe("single_blocks.0.linear2", act_unsigned_from=100), "not at a multiple of 64"),
    (put(f"{LINEAR2}.weight_scale", 0, "U8"), f"tensor {LINEAR2}.weight_scale is torch.uint8 instead of torch.int8"),
    (put(f"{LINEAR2}.weight_scale", 0, "BF16"), f"tensor {LINEAR2}.weight_scale is torch.bfloat16 instead of torch.int8"),
    (put(f"{LINEAR2}.weight_scale", 1, [128, 10]), f"tensor {LINEAR2}.weight_scale has shape [128, 10] instead of [10, 128]"),
    (put(f"{LINEAR2}.weight_scale_2", 1, [1, 128]), f"tensor {LINEAR2}.weight_scale_2 has shape [1, 128] instead of [128]"),
    (put(f"{LINEAR2}.weight_scale_2", 1, [GIGABYTES]), f"tensor {LINEAR2}.weight_scale_2 has shape [100000000000] instead of [128]"),
    (put(f"{LINEAR2}.weight_scale_2", 0, "F32"), f"layer {LINEAR2} has scales of type torch.float32"),
    (put(f"{LINEAR2}.weight_scale_2", 0, "F16"), "is torch.bfloat16 instead of torch.float16"),
    (lambda entries: entries.pop(f"{LINEAR2}.weight_scale_2"), f"lacks tensor {LINEAR2}.weight_scale_2"),
    (lambda entries: entries.pop(f"{LINEAR2}.weight_scale"), f"lacks tensor {LINEAR2}.weight_scale"),
    (lambda entries: entries.update({f"{QKV}.weight_scale_2": ["BF16", [384], None]}),
     f"has tensor {QKV}.weight_scale_2, which a layer of format svdquant_w4a4 has no place for"),
    (describe(LINEAR2, format="svdquant_w4a4_split"), f"tensor {LINEAR2}.weight_scale_2, which a layer of format svdquant_w4a4_split"),
    (describe(QKV, format="svdquant_w4a4_int8_scale", act_unsigned_from=128), f"lacks tensor {QKV}.weight_scale_2"),
    (describe(LINEAR2, act_unsigned_from=None), "lacks a valid act_unsigned_from"),
    (put(QKV + DESCRIPTION, 2, b"{"), "is not JSON"), (put(QKV + DESCRIPTION, 2, b"[" * 60_000), QKV + DESCRIPTION),
    (put(QKV + DESCRIPTION, 2, b" " * 70_000), "has 70000 bytes instead of a few hundred"),
])
def test_files_whose_parts_do_not_fit_each_other(files, tmp_path, change, says):
    entries = {name: list(value) for name, value in files["native"][0].items()}
    change(entries)
    path = write(tmp_path / "bad.safetensors", entries, files["native"][1])
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    assert says in str(caught.value) and "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("metadata", "says"), [
    ({"svdquant.version": "4"}, "format version 4, and this pack reads up to 3"), ({"svdquant.version": "9" * 5000}, "format version 9"),
    ({"svdquant.version": "one"}, "format version one"),
    ({"svdquant.version": "1"}, "format version 1, but double_blocks.0.img_attn.proj.weight_scale needs version 2"),
    ({"svdquant.config": "[" * 100_000}, "no valid svdquant.config"),
    ({"svdquant.recipe": "3"}, "no valid svdquant.recipe"), ({"svdquant.config": '{"depth": 2}'}, "depth = 2"),
    ({"svdquant.config": '{"axes_dim": [1, 2]}'}, "axes_dim"), ({"svdquant.config": '{"hidden_size": 1e99}'}, "hidden_size"),
])
def test_metadata_that_are_false(files, tmp_path, metadata, says):
    path = write(tmp_path / "bad.safetensors", files["native"][0], files["native"][1] | metadata)
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    assert says in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_a_hole_of_100_gigabytes_takes_no_memory(files, tmp_path):
    """The file is complete and consistent, except for one tensor in a shape that no FLUX.1 has."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in (f"{QKV}.weight", "img_in.weight", "txt_in.bias", QKV + DESCRIPTION):
        entries = {key: list(value) for key, value in files["native"][0].items()}
        entries[name] = [entries[name][0], [GIGABYTES // (1 if name.endswith((DESCRIPTION, "qkv.weight")) else 2)], None]
        assert opened(write(tmp_path / "huge.safetensors", entries, files["native"][1])) is None, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    os.remove(tmp_path / "huge.safetensors")


# --- files of other models -----------------------------------------------------------------------------------------


def foreign_file(path, kind, entries=None):
    entries = entries or {name: ["BF16", list(shape), None] for name, shape in FOREIGN[kind][1].items()}
    return write(path, entries, {"format": "pt"})


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_models_are_refused_by_name(tmp_path, kind):
    what = FOREIGN[kind][0]
    path = foreign_file(tmp_path / "model.safetensors", kind)
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    folder = {"a T5 text encoder": "text_encoders", "a CLIP text encoder": "text_encoders", "a VAE": "vae", "a LoRA": "loras"}.get(what)
    move = f"move it to models/{folder}, and " if folder else ""
    assert str(caught.value) == f"model.safetensors is {what}; {move}choose a {TITLES} model in safetensors format."
    with pytest.raises(CheckpointError) as inspected:
        inspection.inspect(read_header(str(path)))
    assert str(inspected.value) == str(caught.value)
    with pytest.raises(CheckpointError, match="model.safetensors is no quantized model"):
        convert.convert(str(path), str(tmp_path / "out.safetensors"), "native")
    assert os.listdir(tmp_path) == ["model.safetensors"]


# --- mutations -----------------------------------------------------------------------------------------------------

VALUES = {
    "drop": st.none(),
    "rename": st.sampled_from(("", "x", f"{QKV}.weight", "double_blocks.9999.a.b", "single_blocks.0.linear1.qweight", PREFIX + "a")),
    "dtype": st.sampled_from(sorted(DTYPES)),
    "shape": st.lists(st.sampled_from((0, 1, 2, 16, 32, 64, 96, 128, 256, 10**5)), max_size=4),
    "extra": st.text(max_size=20),
    "describe": st.tuples(st.sampled_from(("format", "rank", "act_unsigned", "act_unsigned_from", "group_size")),
                          st.sampled_from((None, True, -1, 0, 16, 32, 64, 10**30, 1.5, "x", [], {}, "awq_w4a16", "svdquant_w4a4",
                                           "svdquant_w4a4_split", "svdquant_w4a4_int8_scale", "svdquant_nvfp4", "nvfp4"))),
    "bytes": st.binary(max_size=40),
    "metadata": st.tuples(
        st.sampled_from(("svdquant.version", "svdquant.config", "svdquant.recipe", "_quantization_metadata", "config", "comfy_config",
                         "quantization_config", "model_class")),
        st.sampled_from(("", "1", "{}", "[]", "null", "2", "[" * 3000, '{"depth": 2}', '{"theta": true}', '{"layers": {}}',
                         '{"layers": {"a": 1}}', '{"layers": {"img_in": {"format": "svdquant_w4a4"}}}', '{"weight": 3}'))),
    "offsets": st.tuples(st.integers(-300, 300), st.integers(-300, 300)),
    "swap": st.integers(0, 10**6),
    "size": st.sampled_from((-(10**9), -1000, -1, 1, 8, 10**9)),
}


@st.composite
def mutations(draw):
    """(index of a tensor, kind of change, value)."""
    kind = draw(st.sampled_from(sorted(VALUES)))
    return draw(st.integers(0, 10**6)), kind, draw(VALUES[kind])


def mutate(entries, metadata, index, kind, value):
    """Change entries or metadata, or return a lie(header, size) about the file that they make."""
    name = list(entries)[index % len(entries)]
    descriptions = [key for key in entries if key.endswith(DESCRIPTION)]
    if kind == "drop":
        del entries[name]
    elif kind == "rename":
        entries[value or name.upper()] = entries.pop(name)
    elif kind == "extra":
        entries[name + value] = list(entries[name])
    elif kind == "dtype":
        entries[name][0] = value
    elif kind == "shape":
        entries[name][1:] = [value, None]
    elif kind == "metadata":
        metadata[value[0]] = value[1]
    elif kind in ("describe", "bytes") and descriptions:
        described = entries[descriptions[index % len(descriptions)]]
        if kind == "bytes":
            described[2] = value
        elif described[2] is not None and described[2].startswith(b"{"):
            described[2] = json.dumps(json.loads(described[2]) | {value[0]: value[1]}).encode()
    elif kind in ("offsets", "swap", "size"):
        return lambda header, size: lie(header, size, name, kind, value)
    return None


def lie(header, size, name, kind, value):
    if kind == "size":
        return max(0, size + value)
    names = [key for key in header if key != "__metadata__"]
    if name not in header:
        return size
    if kind == "swap":
        other = names[value % len(names)]
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[name]["data_offsets"]
    else:
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + value[0], stop + value[1]]
    return size


@given(form=st.sampled_from(FORMS), changes=st.lists(mutations(), min_size=1, max_size=3))
@settings(FUZZ, max_examples=1000)
def test_mutated_files_are_refused_or_match_their_description(files, tmp_path, form, changes):
    entries = {name: list(value) for name, value in files[form][0].items()}
    metadata, lies = dict(files[form][1]), []
    for change in changes:
        if (distort := mutate(entries, metadata, *change)) is not None:
            lies.append(distort)

    def all_lies(header, size):
        for distort in lies:
            size = distort(header, size)
        return size

    path = write(tmp_path / "mutated.safetensors", entries, metadata, all_lies)
    state = opened(path)
    if state is not None:
        assert agrees(state, entries, form)
    try:
        inspection.text(inspection.inspect_body(read_header(str(path))))  # as the command line does, without ComfyUI
    except CheckpointError as error:
        assert state is None, error
    else:
        assert state is not None, "Inspect accepts a file that Load refuses"


@given(kind=st.sampled_from(sorted(FOREIGN)), changes=st.lists(mutations(), min_size=1, max_size=4))
@example(kind="FLUX.2, diffusers", changes=[(0, "rename", ""), (21, "drop", None)])  # without the name that only a FLUX.2 has
@settings(FUZZ, max_examples=600)
def test_mutated_files_of_other_models_are_refused(tmp_path, kind, changes):
    """The files have holes of gigabytes, so that any allocation for them would be noticed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries, metadata = {name: ["BF16", list(shape), None] for name, shape in FOREIGN[kind][1].items()}, {}
    lies = [distort for change in changes if entries and (distort := mutate(entries, metadata, *change)) is not None]

    def all_lies(header, size):
        for distort in lies:
            size = distort(header, size)
        return size

    path = write(tmp_path / "mutated.safetensors", entries, metadata, all_lies)
    assert opened(path) is None
    with pytest.raises(CheckpointError):
        inspection.inspect(read_header(str(path)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@given(st.sampled_from(("native", "nunchaku", "kitchen")), st.data())
@settings(FUZZ, max_examples=1000)
def test_mutated_bytes_are_refused_or_read(files, tmp_path, form, data):
    """The mutations change bytes of the header or the body, cut the file, or insert bytes."""
    path = write(tmp_path / "mutated.safetensors", *files[form])
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)))
        raw[where] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        where = data.draw(st.integers(0, len(raw)))
        raw[where:where + data.draw(st.integers(0, 100))] = data.draw(st.binary(max_size=100))
    path.write_bytes(raw)
    if opened(path) is not None:
        assert sum(info.stop - info.start for info in read_header(str(path)).tensors.values()) <= len(raw)
