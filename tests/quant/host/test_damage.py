"""Bodies that are damaged while their headers are sound: Inspect finds every flipped bit of a file that SVDQuant wrote, Load what spoils an
image, and both find impossible values in anybody's file."""

import json
import struct

import numpy as np
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import checksums, inspection, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.host import loader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..nunchaku_nvfp4 import write_nvfp4
from ..packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
LAYER = "single_blocks.0.linear1"
CODES = f"{LAYER}.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{form: bytes of one model in it}: ours, Nunchaku's by our writer, and both without metadata, as other software writes them."""
    folder, model = tmp_path_factory.mktemp("models"), packed_flux()
    native.save(str(folder / "native"), *model, {"preset": "data-free"}, "flux")
    nunchaku_writer.save(str(folder / "nunchaku"), *model, {"preset": "data-free"}, "flux")
    write_nvfp4(folder / "nvfp4")
    found = {form: (folder / form).read_bytes() for form in ("native", "nunchaku", "nvfp4")}
    return found | {"kitchen": without(found["native"]), "theirs": without(found["nunchaku"], "svdquant.")}


def without(raw, begins=""):
    """A file without its metadata whose names begin so."""
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + size])
    entries["__metadata__"] = {key: text for key, text in entries["__metadata__"].items() if not key.startswith(begins)}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size:]


@pytest.fixture
def opened(files, tmp_path):
    """A function that writes a form's file and returns (path, its header)."""
    def write(form):
        path = tmp_path / "flux.safetensors"
        path.write_bytes(files[form])
        return path, read_header(str(path))
    return write


def flip(path, info, byte=0, bit=0):
    data = bytearray(path.read_bytes())
    data[info.start + byte] ^= 1 << bit
    path.write_bytes(data)


def inspected(path):
    return inspection.inspect_body(read_header(str(path)))


def refused(run, path, name):
    with pytest.raises(CheckpointError) as caught:
        run(str(path))
    message = str(caught.value)
    # Some readers find a damaged value before its checksum is compared.
    assert message.startswith("flux.safetensors") and name.rpartition(".")[0] in message and message.endswith("."), message
    return message


@pytest.mark.parametrize("form", ["native", "nunchaku"])
def test_a_sound_file_says_so(opened, form):
    path, header = opened(form)
    info = inspected(path)
    assert info["intact"] == len(header.tensors) == len(checksums.stored(header))
    assert f"checked: {len(header.tensors)} tensors have the checksums with which they were saved" in inspection.text(info).splitlines()
    loader.load_model(str(path))


@pytest.mark.parametrize("form", ["kitchen", "theirs", "nvfp4"])
def test_a_sound_file_without_checksums_says_so(opened, form):
    path, _ = opened(form)
    assert inspected(path)["intact"] == 0
    assert "there are no checksums, which only SVDQuant writes" in inspection.text(inspected(path))
    loader.load_model(str(path))


@pytest.mark.parametrize("form", ["native", "nunchaku"])
def test_one_flipped_bit_anywhere_is_found(opened, form):
    path, header = opened(form)
    whole = path.read_bytes()
    for number, (name, info) in list(enumerate(header.tensors.items()))[::3]:
        if info.stop > info.start and not name.endswith(".comfy_quant"):
            flip(path, info, number * 7919 % (info.stop - info.start), number % 8)
            refused(inspected, path, name)
            path.write_bytes(whole)
    assert inspected(path)["intact"]


def test_load_finds_all_but_flipped_bits_within_the_codes(opened):
    path, header = opened("native")
    whole = path.read_bytes()
    names = {name.rpartition(".")[2]: name for name in header.tensors}  # one of each kind
    for name in (name for name in names.values() if not name.endswith((".weight", ".comfy_quant"))):
        flip(path, header.tensors[name], 1, 0)
        refused(loader.load_model, path, name)
        path.write_bytes(whole)
    size = header.tensors[CODES].stop - header.tensors[CODES].start
    flip(path, header.tensors[CODES], size - 1)
    refused(loader.load_model, path, CODES)
    path.write_bytes(whole)
    flip(path, header.tensors[CODES], 5)
    loader.load_model(str(path))
    refused(inspected, path, CODES)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_load_finds_a_zeroed_tail(opened, kept):
    """As of a download that was cut off after its file had got its size."""
    path, header = opened("native")
    data = bytearray(path.read_bytes())
    first = min(info.start for info in header.tensors.values())
    cut = first + int(kept * (len(data) - first))
    data[cut:] = bytes(len(data) - cut)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="flux.safetensors"):
        loader.load_model(str(path))


def test_load_finds_exchanged_tensors(opened):
    path, header = opened("native")
    whole, groups = path.read_bytes(), {}
    for name, info in header.tensors.items():
        if not name.endswith(".comfy_quant"):
            groups.setdefault((info.shape, info.dtype), []).append((name, info))
    pairs = [group[:2] for group in groups.values() if len(group) > 1]
    assert len(pairs) > 10
    for (first, a), (second, b) in pairs:
        data = bytearray(whole)
        data[a.start:a.stop], data[b.start:b.stop] = whole[b.start:b.stop], whole[a.start:a.stop]
        if data != whole:
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=f"tensor ({first}|{second}) "):
                loader.load_model(str(path))


NAN, INFINITY, MINUS = {"BF16": b"\xc0\x7f", "F8": b"\x7f"}, b"\x80\xff", b"\x80\xbf"  # MINUS: -1


@pytest.mark.parametrize(("form", "name", "value", "says"), [
    ("kitchen", f"{LAYER}.weight_smooth_factor", b"\0\0", "not positive and finite"),
    ("kitchen", f"{LAYER}.weight_smooth_factor", MINUS, "not positive and finite"),
    ("kitchen", f"{LAYER}.weight_smooth_factor", NAN["BF16"], "not positive and finite"),
    ("kitchen", f"{LAYER}.weight_proj_up", NAN["BF16"], "NaN or infinity"), ("kitchen", f"{LAYER}.bias", INFINITY, "NaN or infinity"),
    ("kitchen", "double_blocks.0.img_mod.lin.weight_scale", INFINITY, "NaN or infinity"),
    ("kitchen", "double_blocks.0.img_mod.lin.weight_zeros", NAN["BF16"], "NaN or infinity"),
    ("kitchen", "img_in.weight", NAN["BF16"], "NaN or infinity"),
    ("theirs", "transformer_blocks.0.mlp_fc1.smooth", b"\0\0", "not positive and finite"),
    ("theirs", "transformer_blocks.0.mlp_fc1.wscales", NAN["BF16"], "NaN or infinity"),
    ("theirs", "transformer_blocks.0.mlp_fc1.lora_up", INFINITY, "NaN or infinity"),
    ("nvfp4", "transformer_blocks.0.mlp_fc1.wscales", NAN["F8"], "NaN or infinity"),
])
def test_impossible_values_are_found_in_anybodys_file(opened, form, name, value, says):
    path, header = opened(form)
    start = header.tensors[name].start
    data = bytearray(path.read_bytes())
    data[start + 4:start + 4 + len(value)] = value
    path.write_bytes(data)
    assert says in refused(loader.load_model, path, name) and says in refused(inspected, path, name)


@pytest.mark.parametrize(("name", "value", "says"), [
    (f"{LAYER}.weight_proj_up", float("nan"), "NaN or infinity"), (f"{LAYER}.weight_proj_up", float("-inf"), "NaN or infinity"),
    (f"{LAYER}.weight_smooth_factor", 0.0, "not positive and finite"), ("img_in.weight", float("inf"), "NaN or infinity"),
])
@pytest.mark.parametrize("writer", [native, nunchaku_writer])
def test_impossible_values_are_not_saved(tmp_path, writer, name, value, says):
    """Load and Inspect would refuse the file."""
    tensors, *rest = packed_flux()
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[5] = value
    with pytest.raises(CheckpointError, match="^The model is not saved, because its tensor .* would spoil every image; ") as caught:
        writer.save(str(tmp_path / "flux.safetensors"), tensors, *rest, {"preset": "data-free"}, "flux")
    assert says in str(caught.value) and not list(tmp_path.iterdir())


def test_inspect_finds_impossible_values_under_right_checksums(opened):
    """Of a file that was made to have them."""
    path, header = opened("native")
    name = f"{LAYER}.weight_proj_up"
    data, info = bytearray(path.read_bytes()), header.tensors[name]
    data[info.start:info.start + 2] = NAN["BF16"]
    sums = json.loads(header.metadata[checksums.KEY])
    body = np.frombuffer(bytes(data[info.start:info.stop]), np.uint8)
    new = f"{checksums.checksum(body):08x}{checksums.checksum(body[-checksums.PAGE:]):08x}"
    path.write_bytes(bytes(data).replace(sums[name].encode(), new.encode()))
    assert "NaN or infinity" in refused(inspected, path, name)


def test_a_checksum_is_what_its_description_says():
    """By Python's own numbers."""
    data = np.frombuffer(np.random.default_rng(0).bytes(3 * checksums.PAGE + 11), np.uint8)
    sums = b""
    for start in range(0, len(data), checksums.PAGE):
        page = bytes(data[start:start + checksums.PAGE])
        page += bytes(-len(page) % 8)
        words = struct.unpack(f"<{len(page) // 8}Q", page)
        sums += (sum(words) % 2**64).to_bytes(8, "little")
    assert checksums.checksum(data) == checksums.zlib.crc32(sums)
    in_blocks = checksums.checksum(data[2 * checksums.PAGE:], checksums.checksum(data[:2 * checksums.PAGE]))
    assert in_blocks == checksums.checksum(data) and checksums.checksum(data[:0]) == 0


@pytest.mark.parametrize("value", ["", "[]", "{", '{"a": 3}', '{"a": "12"}', '{"a": "zzzzzzzzzzzzzzzz"}', "[" * 100_000])
def test_damaged_checksums_are_refused(files, tmp_path, value):
    raw = files["native"]
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + size])
    entries["__metadata__"][checksums.KEY] = value
    text = json.dumps(entries).encode()
    path = tmp_path / "flux.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size:])
    with pytest.raises(CheckpointError, match="flux.safetensors has no valid svdquant.checksums in its metadata; download or save"):
        loader.load_model(str(path))


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_body_is_found(files, tmp_path, data):
    raw = bytearray(files["native"])
    first = 8 + int.from_bytes(raw[:8], "little")
    start = data.draw(st.integers(first, len(raw) - 1))
    kind, length = data.draw(st.sampled_from(("flip", "zero", "random", "move"))), data.draw(st.integers(1, 20_000))
    stop = min(len(raw), start + length)
    if kind == "flip":
        raw[start] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "zero":
        raw[start:stop] = bytes(stop - start)
    elif kind == "random":
        raw[start:stop] = np.random.default_rng(length).bytes(stop - start)
    else:
        other = data.draw(st.integers(first, len(raw) - 1)) // checksums.PAGE * checksums.PAGE
        raw[start:stop] = raw[other:other + stop - start].ljust(stop - start, b"\0")
    path = tmp_path / "flux.safetensors"
    path.write_bytes(raw)
    if raw == files["native"]:
        inspected(path)
    else:
        with pytest.raises(CheckpointError):
            inspected(path)


def test_files_of_newer_minor_versions_load_and_say_so(files, tmp_path):
    raw = files["native"]
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + size])
    entries["__metadata__"] |= {"svdquant.minor": "7", "svdquant.later": "?"}
    text = json.dumps(entries).encode()
    path = tmp_path / "flux.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size:])
    says = "It is of format version 2.7, and this pack knows 2.1: it loads whole"
    newer, line = loader.load_described(str(path))
    assert says in line and says in inspection.text(inspected(path))
    (tmp_path / "older.safetensors").write_bytes(raw)
    older, line = loader.load_described(str(tmp_path / "older.safetensors"))
    assert "format version" not in line and "format version" not in inspection.text(inspected(tmp_path / "older.safetensors"))
    ours, theirs = (patcher.model.state_dict() for patcher in (older, newer))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
