"""The autotune without a GPU: its alternatives, its records, and that it takes the fastest choice with the same bits, on fake kernels."""

import functools

import pytest
import torch
from comfyui_svdquant.cuda import autotune, awq, compiler, gemm_mma, kernel_records, mlp, ops, self_test, targets
from comfyui_svdquant.cuda.choose import W4A16, Layer, choose
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.gemm_mma import LARGE, MEDIUM, SMALL
from comfyui_svdquant.cuda.operands import LoRASizes
from comfyui_svdquant.cuda.targets import TARGETS

BF16 = torch.bfloat16
CPU = torch.device("cpu")
ADA = TARGETS[89]
LAYER = Layer(70, 192, 256, 32, 256, 4, BF16)  # its default is the medium tile
WIDE = Layer(4096, 9216, 3072, 32, 3072, 8, BF16)


def chosen(layer=LAYER, target=ADA, sms=128):
    return choose(layer, target, sms)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A fake Ada on the CPU: {"seconds": {tile: of a run}, "bits": {tile: another output}}, and the tiles that ran."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.delenv(autotune.VARIABLE, raising=False)
    for state in (autotune._pending, autotune._spent):
        state.clear()
    does = {"seconds": {}, "bits": {}, "ran": [], "machine": ("an RTX 4090", "uuid", "580.1")}
    monkeypatch.setattr(kernel_records, "machine", lambda device: does["machine"])
    monkeypatch.setattr(compiler, "all_sources_digest", lambda: "sources")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))

    def run(kernels, x, operands):
        does["ran"].append(kernels.tile)
        y = torch.zeros(x.shape[0], operands.weight.shape[0], dtype=x.dtype)
        y[0, 0] = does["bits"].get(kernels.tile, 0)
        return y

    def times(runs, device, clock):
        return None if does.get("late") else [does["seconds"].get(run.args[0].tile, 1.0) for run in runs]

    does["runners"] = {Layer: run}
    monkeypatch.setattr(autotune, "_times", times)
    yield does
    for state in (autotune._pending, autotune._spent):
        state.clear()


def tune(fake):
    changes = []
    autotune.tune(CPU, fake["runners"], lambda: changes.append(True))
    return len(changes)


def tuned(layer=LAYER, target=ADA):
    return autotune.tuned(chosen(layer, target), layer, target, CPU)


@pytest.mark.parametrize(("setting", "measured", "unmeasured"), [(None, False, True), ("", False, True), ("0", False, False),
                                                                 ("1", True, True)])
def test_where_choices_are_measured(monkeypatch, setting, measured, unmeasured):
    monkeypatch.delenv(autotune.VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(autotune.VARIABLE, setting)
    assert [autotune.wanted(TARGETS[number]) for number in (90, 89, 120)] == [measured, unmeasured, unmeasured]
    assert autotune.wanted(targets.for_capability((9, 5))) is unmeasured


def test_the_fastest_choice_is_kept(fake):
    """The default holds until a faster one is known; later processes read it."""
    before = tuned()
    assert before == chosen() and before.tile == MEDIUM
    fake["seconds"] = {MEDIUM: 1.0, SMALL: 0.5, LARGE: 0.7}
    assert tune(fake) == 1 and set(fake["ran"]) == {LARGE, SMALL, MEDIUM}
    assert tuned() == before._replace(tile=SMALL)
    autotune._pending.clear()
    assert tuned().tile == SMALL and not autotune._pending[CPU], "another process"
    assert autotune.is_measured(chosen(), LAYER, ADA, CPU) is True
    assert autotune.is_measured(chosen(WIDE, ADA), WIDE, ADA, CPU) is False and not autotune._pending[CPU]
    assert tune(fake) == 0


def test_what_was_asked_for_first_is_measured_first(fake, monkeypatch):
    """The budget may end before the sizes that are prepared last."""
    measured = []
    monkeypatch.setattr(autotune, "_fastest", lambda kernels, values, layer, *_: measured.append(layer) or dict.fromkeys(values, 0))
    autotune.tuned(chosen(), LAYER, ADA, CPU)
    autotune.tuned(chosen(WIDE, ADA), WIDE, ADA, CPU)
    tune(fake)
    assert measured == [LAYER, WIDE]


def test_other_bits_are_no_candidate(fake):
    """A wrong kernel may be the fastest. A NaN isn't equal to itself, but its bits are."""
    fake["seconds"], fake["bits"] = {LARGE: 0.1, SMALL: 0.5}, {LARGE: 1e-6}
    tuned()
    tune(fake)
    assert tuned().tile == SMALL
    assert fake["ran"].count(LARGE) == 1


def test_a_kernel_that_writes_nothing(fake):
    """It doesn't find another's result in the memory that it gets."""
    outputs = []

    def run(kernels, x, operands):
        if kernels.tile == MEDIUM:
            return torch.zeros(1)
        if kernels.tile == SMALL:
            outputs.append(torch.zeros(1))
        return outputs[-1]

    fake["runners"], fake["seconds"] = {Layer: run}, {LARGE: 0.1, SMALL: 0.5}
    values = {"tile": (MEDIUM, SMALL, LARGE)}
    assert autotune._fastest(chosen(), values, LAYER, CPU, run) == {"tile": 1}


def test_a_kernel_that_does_not_compile_is_no_candidate(fake):
    def run(kernels, x, operands):
        if kernels.tile == LARGE:
            raise KernelsUnavailable("NVRTC could not compile it")
        return torch.zeros(1)

    fake["runners"], fake["seconds"] = {Layer: run}, {LARGE: 0.1, SMALL: 0.5}
    tuned()
    tune(fake)
    assert tuned().tile == SMALL


def test_little_is_not_enough(fake):
    """Timings vary: a choice within 3 % of the default doesn't replace it, but the record says that it was measured."""
    fake["seconds"] = {LARGE: 0.98}
    tuned()
    assert tune(fake) == 0 and tuned() == chosen() and not autotune._pending[CPU]


def test_what_a_record_belongs_to(fake, monkeypatch):
    tuned()
    tune(fake)
    for change in ("machine", "sources", "layer"):
        with monkeypatch.context() as patch:
            if change == "machine":
                patch.setitem(fake, "machine", ("an RTX 4090", "uuid", "581.0"))
            elif change == "sources":
                patch.setattr(compiler, "all_sources_digest", lambda: "others")
            tuned(LAYER._replace(m=71) if change == "layer" else LAYER)
            assert len(autotune._pending[CPU]) == 1, change
            autotune._pending.clear()
    tuned()
    assert not autotune._pending[CPU]


@pytest.mark.parametrize("damage", [b"", None, "3", '{"tile": 7}', '{"tile": true}', '{"tile": 1, "plans": 0}', "{}"])
def test_a_damaged_record_is_made_anew(fake, damage):
    fake["seconds"] = {SMALL: 0.5}
    tuned()
    tune(fake)
    (entry,) = compiler.cache_folder().iterdir()
    whole = entry.read_bytes()
    if isinstance(damage, str):
        compiler.write_entry(entry, damage.encode())
    else:
        entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert tuned() == chosen()
    tune(fake)
    assert tuned().tile == SMALL and entry.read_bytes() == whole


def test_the_budget(fake):
    """What is left over is measured by the next process, and a layer that was begun too late isn't recorded."""
    tuned()
    tuned(LAYER._replace(m=71))
    autotune._spent[CPU] = autotune.BUDGET
    assert tune(fake) == 0 and fake["ran"] == []
    autotune._spent[CPU] = 0
    fake["late"] = True
    tune(fake)
    assert not compiler.cache_folder().exists()


@pytest.mark.parametrize("failure", ["full", "out of memory"])
def test_memory_that_the_model_needs(fake, monkeypatch, failure):
    def out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    tuned()
    if failure == "full":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 16, 1 << 31))
    else:
        fake["runners"] = {Layer: out}
    assert tune(fake) == 0 and tuned() == chosen() and not compiler.cache_folder().exists()


def test_measuring_waits_for_the_kernels(monkeypatch):
    """It is the last of warm_up's jobs, and begins when all others are done."""
    order = []
    monkeypatch.setattr(autotune, "tune", lambda device, runners, changed: order.append("measured"))
    monkeypatch.setattr(ops, "prepare", lambda *layer, device: order.append(layer[0]))
    for future in ops.warm_up([(m, 192, 256, 32, 256, 8, BF16) for m in range(20)], CPU, [functools.partial(order.append, "an MLP")]):
        future.result()
    assert len(order) == 22 and order[-1] == "measured"


def test_the_cost_model_was_measured_on_hopper(fake):
    assert autotune.tuned(chosen(WIDE, TARGETS[90]), WIDE, TARGETS[90], CPU).wgmma and not autotune._pending[CPU]


def test_the_op_takes_what_was_measured(fake, monkeypatch):
    """ops.chosen() gives the default, then the measured choice, which is self-tested like any other."""
    tested = []
    monkeypatch.setattr(targets, "for_device", lambda device: ADA)
    monkeypatch.setattr(targets, "multiprocessors", lambda device: 128)
    monkeypatch.setattr(self_test, "passes", lambda kernels, *args: tested.append(kernels.tile) or True)
    for cache in ops.choices:
        cache.cache_clear()
    assert ops.chosen(LAYER, CPU).tile == MEDIUM
    fake["seconds"] = {SMALL: 0.5}
    autotune.tune(CPU, fake["runners"], ops.choose_again)
    assert ops.chosen(LAYER, CPU).tile == SMALL and tested == [MEDIUM, SMALL]
    for cache in ops.choices:
        cache.cache_clear()


# --- The alternatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", TARGETS)
@pytest.mark.parametrize("layer", [WIDE, WIDE._replace(act_bits=4), WIDE._replace(rank=0), WIDE._replace(act_bits=W4A16, m=1)])
def test_the_alternatives_of_a_layer(number, layer):
    target = TARGETS[number]
    layer = layer._replace(dtype=target.dtypes[0])
    kernels = choose(layer, target, 132)
    values = autotune.alternatives(kernels, layer, target)
    for field, options in values.items():
        assert options[0] == getattr(kernels, field) and len(options) == len(set(options)) > 1
    if layer.act_bits == W4A16:
        assert values == {"tiles": awq.TILES}
    else:
        plans = [options[0] for options in values.get("plans", [kernels.plans])]
        assert len({(plan.ranks, plan.ctas) for plan in plans}) == 1 or layer.rank == 0
        assert all(sorted(options) == sorted(kernels.plans) for options in values.get("plans", ()))
        assert len(values["tile"]) == (11 if kernels.wgmma else 3 if target.async_copies else 2)


def test_two_ctas_share_k_only_in_layers_of_one_part():
    layer = WIDE._replace(k=15360, unsigned_from=3072)
    assert {tile[2] for tile in autotune.alternatives(choose(layer, TARGETS[90], 132), layer, TARGETS[90])["tile"]} == {1}


def test_the_alternatives_of_an_mlp():
    layers = mlp.layers(4096, 3072, 12288, 3072, 32, 32, 3072, 0, BF16)
    values = autotune.alternatives(choose(layers, ADA, 128), layers, ADA)
    assert set(values["tile"]) == set(gemm_mma.next_tiles_of(choose(layers, ADA, 128).storage))
    assert set(values["second_tile"]) == {LARGE, MEDIUM, SMALL}


@pytest.mark.parametrize("layer", [LAYER, LAYER._replace(act_bits=8, gelu_from=64), LAYER._replace(act_bits=W4A16, rank=0),
                                   LAYER._replace(lora=LoRASizes((16,)))])
def test_the_operands_run(layer):
    """They are what the op takes, and give numbers."""
    x, *operands = autotune.random_operands(layer, CPU)
    y = ops.awq_linear(x, *operands) if layer.act_bits == W4A16 else ops.svdquant_linear(x, *operands)
    assert y.shape == (70, 192) and y.isfinite().all() and len(y.unique()) > 100
