"""several_gpus.py's times of each process, and its result file."""

import json
from types import SimpleNamespace

import pytest
import rank_times
import several_gpus
from rank_times import RankTimes


def test_the_process_that_comes_last_to_a_message_does_not_wait():
    first = [("a", 1.0, 3.5), ("b", 2.0, 0.25), ("a", 1.0, 0.5), ("the end", 0.5, 0.0)]
    second = [("a", 4.0, 0.5), ("b", 1.0, 1.25), ("a", 1.0, 0.5), ("the end", 0.5, 0.0)]
    assert rank_times.shared([first, second]) == [
        {"computes": 4.5, "waits": 3.0, "exchanges": 1.25, "before": {"a": [2.0, 4.0], "b": [2.0, 0.25], "the end": [0.5, 0.0]}},
        {"computes": 6.5, "waits": 1.0, "exchanges": 1.25, "before": {"a": [5.0, 1.0], "b": [1.0, 1.25], "the end": [0.5, 0.0]}}]


def test_a_message_has_the_name_of_its_caller_and_counts_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(RankTimes, "mark", lambda self: next(clock))
    monkeypatch.setattr(rank_times.torch.cuda, "is_available", lambda: False)
    ranks = SimpleNamespace(gathered=lambda value: [value], from_first=lambda value: value)
    ranks.exchanged = lambda value: ranks.gathered(value)
    times = RankTimes(ranks)

    def statistics():
        return ranks.exchanged(5)

    assert statistics() == [5] and ranks.from_first(6) == 6
    assert times.spans() == [("statistics", 1, 1), ("test_a_message_has_the_name_of_its_caller_and_counts_once", 1, 1), ("the end", 1, 0.0)]


def test_an_earlier_results_other_parts_stay_and_note_what_they_are_of(tmp_path):
    earlier = {"commit": "old", "arguments": {"blocks": [5, 10]}, "draw": {"lines": []}, "quantize_one": {}, "quantize_killed": {}}
    (path := tmp_path / "x.json").write_text(json.dumps(earlier))
    found = several_gpus.merged(path, {"commit": "new", "arguments": {"blocks": [19, 38]}}) | {"quantize_one": {"commit": "new"}}
    assert found == {"commit": "new", "arguments": {"blocks": [19, 38]}, "draw": {"lines": [], "commit": "old"},
                     "quantize_one": {"commit": "new"}, "quantize_killed": {"commit": "old", "blocks": [5, 10]}}


@pytest.mark.parametrize("together", [False, True])
def test_the_runs_go_one_after_the_other(monkeypatch, tmp_path, together):
    """Also those that have started together: each waits for the file of its turn."""
    running, log, written = [], [], []

    def launch(args, part, processes, limit, *options, ready):
        ready()
        if together:
            go = options[options.index("--go") + 1]
            while not several_gpus.os.path.exists(go):
                several_gpus.time.sleep(0.01)
        log.append((processes, list(running)))
        running.append(processes)
        folder = tmp_path / options[options.index("--name") + 1]
        folder.mkdir()
        (folder / several_gpus.FILE).write_bytes(b"file")
        several_gpus.time.sleep(0.05)
        running.remove(processes)
        return {"lines": [{}]}

    monkeypatch.setattr(several_gpus, "launch", launch)
    several_gpus.quantize_runs(SimpleNamespace(runs=["two", "one"], start_together=together, folder=str(tmp_path), limit=1, blocks=(1, 1)),
                               lambda name, found: written.append((name, "sha256" in found["lines"][0])))
    assert log == [(2, []), (1, [])]
    assert [name for name, _ in written[:2]] == ["quantize_two", "quantize_one"] and written[2:] == [("quantize_two", True),
                                                                                                   ("quantize_one", True)]
