"""The arithmetic of several GPUs."""

import json

import several_gpus_estimate as estimate

ENTRIES = json.loads(estimate.STEPS.read_text(encoding="utf-8"))["entries"]
NVLINK, *_, PCIE = estimate.LINKS


def test_the_bytes_of_an_exchange():
    """Two GPUs: each has half of the tokens and sends the q, k and v of half of the heads, a quarter of all."""
    assert estimate.bytes_sent(1000, 2) == (3 * 1000 * 3072 * 2 / 4, 1000 * 3072 * 2 / 4)
    sent = [sum(estimate.bytes_sent(4608, gpus)) for gpus in (2, 4, 8)]
    assert sent == sorted(sent, reverse=True)


def test_a_step_of_one_gpu_is_the_measured_one_and_more_gpus_help_less_and_less():
    for pixels in (1024, 2048):
        work = estimate.work_of(pixels, ENTRIES)
        times = [estimate.step_seconds(pixels, gpus, NVLINK, work) for gpus in (1, 2, 4, 8)]
        measured = next(entry["one"]["ms"] for entry in json.loads(estimate.SEVERAL.read_text(encoding="utf-8"))["draw"]["lines"]
                        if entry["size"] == pixels)
        assert abs(times[0] * 1e3 / measured - 1) < 0.05
        assert all(gpus * time >= times[0] for gpus, time in zip((1, 2, 4, 8), times)), "no GPU is worth more than one"
        assert estimate.step_seconds(pixels, 2, PCIE, work) > times[1]


def test_what_is_not_divided_bounds_a_quantization():
    assert estimate.quantize_seconds(1, 100, 10, 5) == 105
    assert estimate.quantize_seconds(10, 100, 10, 5) == 24


def test_the_tables_have_a_column_for_eight_gpus():
    assert all(line.count("|") >= 6 for line in estimate.tables().splitlines() if line)
