"""Files that lack a tensor, have one too many or one of another shape: opened, inspected and converted without ComfyUI, each is refused
in one sentence. tests/quant/host/test_fuzz.py compares the same check with loading."""

from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import convert, formats, inspection, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from safetensors.torch import load_file, save_file

from ..packed_flux import packed_flux
from ..random_chroma import chroma_tensors
from ..random_flux import flux_tensors

PREFIX = "model.diffusion_model."
UNCHECKED = (".comfy_quant", ".smooth_orig")  # a description's bytes count, not its shape; nothing reads the other


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{form: file} of a small model in each form."""
    folder, model = tmp_path_factory.mktemp("models"), packed_flux()
    found = {form: folder / f"{form}.safetensors" for form in ("native", "nunchaku", "kitchen", "plain", "chroma")}
    native.save(str(found["native"]), *model, {"preset": "data-free"}, "flux")
    nunchaku_writer.save(str(found["nunchaku"]), *model, {"preset": "data-free"}, "flux")
    save_file({PREFIX + name: tensor for name, tensor in load_file(found["native"]).items()}, found["kitchen"])
    save_file(flux_tensors(hidden=128, depth_single=1), found["plain"])
    save_file(chroma_tensors(hidden=128, depth_single=1), found["chroma"])
    return found


def refusal(header):
    with pytest.raises(CheckpointError) as caught:
        inspection.inspect(header)
    message = str(caught.value)
    assert message.startswith(header.file) and ";" in message and "\n" not in message and message.endswith((".", ")."))
    if found := formats.identify(header):  # as convert begins
        with pytest.raises(CheckpointError):
            found.reader.open_file(header)
    return message


@pytest.mark.parametrize("form", ["native", "nunchaku", "kitchen", "plain", "chroma"])
def test_each_tensor_is_needed_in_its_shape(paths, form):
    header = read_header(str(paths[form]))
    inspection.text(inspection.inspect(header))
    for name, info in header.tensors.items():
        if not name.endswith(UNCHECKED):
            refusal(replace(header, tensors={key: value for key, value in header.tensors.items() if key != name}))
            for shape in ((*info.shape, 1), (2 * info.shape[0], *info.shape[1:]) if info.shape else (2,)):
                refusal(replace(header, tensors=header.tensors | {name: replace(info, shape=shape)}))


@pytest.mark.parametrize("form", ["native", "nunchaku", "kitchen", "plain", "chroma"])
def test_no_other_tensor_may_be_there(paths, form):
    header, prefix = read_header(str(paths[form])), PREFIX if form == "kitchen" else ""
    extra = next(iter(header.tensors.values()))
    for name in ("extra.weight", "double_blocks.0.extra", "single_blocks.9.norm.key_norm.scale"):
        assert name.split(".")[0] in refusal(replace(header, tensors=header.tensors | {prefix + name: extra}))


@pytest.mark.parametrize(("form", "dropped", "says"), [
    ("native", "vector_in.out_layer.bias", "lacks tensor vector_in.out_layer.bias; the file is incomplete"),
    ("kitchen", "time_in.in_layer.weight", "lacks tensor time_in.in_layer.weight; the file is incomplete"),
    ("nunchaku", "time_text_embed.guidance_embedder.linear_2.bias", "lacks tensor time_text_embed.guidance_embedder.linear_2.bias"),
    ("plain", "img_in.bias", "lacks tensor img_in.bias; the file is incomplete"),
    ("chroma", "distilled_guidance_layer.norms.1.scale", "lacks tensor distilled_guidance_layer.norms.1.scale"),
])
def test_the_missing_tensor_is_named(paths, form, dropped, says):
    header = read_header(str(paths[form]))
    name = next(name for name in header.tensors if name.endswith(dropped))
    assert says in refusal(replace(header, tensors={key: value for key, value in header.tensors.items() if key != name}))


def test_nothing_is_written_for_an_incomplete_model(paths, tmp_path):
    tensors = load_file(paths["native"])
    del tensors["time_in.out_layer.weight"]
    save_file(tensors, tmp_path / "cut.safetensors", metadata=read_header(str(paths["native"])).metadata)
    with pytest.raises(CheckpointError, match=r"^cut\.safetensors lacks tensor time_in\.out_layer\.weight; "):
        convert.convert(str(tmp_path / "cut.safetensors"), str(tmp_path / "out.safetensors"), "nunchaku")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def newer(name):
    """A tensor's name as ComfyUI has it since 0.14."""
    return name.replace("_norm.scale", "_norm.weight")


@pytest.mark.parametrize("form", ["native", "kitchen", "plain"])
def test_the_norms_names_of_newer_hosts_are_read(paths, tmp_path, form):
    tensors, metadata = load_file(paths[form]), read_header(str(paths[form])).metadata
    save_file({newer(name): tensor for name, tensor in tensors.items()}, tmp_path / "newer.safetensors", metadata=metadata)
    header = read_header(str(tmp_path / "newer.safetensors"))
    inspection.inspect(header)
    if found := formats.identify(header):
        first, second = (dict(found.reader.open_file(read_header(str(path))).tensors()) for path in (paths[form], header.path))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    norm = next(name for name in tensors if name.endswith("_norm.scale"))
    save_file(tensors | {newer(norm): tensors[norm].clone()}, tmp_path / "both.safetensors", metadata=metadata)
    assert norm.removeprefix(PREFIX) in refusal(read_header(str(tmp_path / "both.safetensors")))
