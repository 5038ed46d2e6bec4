"""The workloads of the benchmarks: deterministic, of the right means, and a bad trace is named by line and column."""

from __future__ import annotations

import collections
import math
import random
import statistics
from pathlib import Path

import pytest

from steploom.cli.benches import workloads
from steploom.cli.benches.workloads import Arrival, gamma, poisson, w1, w2, w3, w4
from steploom.errors import ConfigError

HEAD = "arrival_s,user,task,num_inference_steps,num_images,prompt_chars,negative_prompt_chars,num_loras,exec_s,status"


def write(folder: Path, *rows: str, head: str = HEAD) -> Path:
    file = folder / "trace.csv"
    file.write_text("\n".join((head, *rows)) + "\n")
    return file


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize("cv", [1.0, workloads.BURSTY_CV, 0.5])
def test_arrivals_have_the_mean_and_the_variation_that_were_asked_for(cv: float):
    found = gaps(gamma(20_000, 4.0, cv, seed=3))
    assert statistics.mean(found) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(found) == pytest.approx(0.25 * cv, rel=0.05)
    assert min(found) >= 0


def test_poisson_is_gamma_of_variation_one_and_rate_only_stretches():
    assert poisson(50, 2.0, seed=7) == gamma(50, 2.0, 1.0, seed=7)
    assert poisson(50, 1.0, seed=7) == pytest.approx([2 * at for at in poisson(50, 2.0, seed=7)])
    assert poisson(50, 2.0, seed=8) != poisson(50, 2.0, seed=7)
    assert poisson(3, math.inf, seed=1) == [0, 0, 0]
    assert gamma(3, 2.0, 0.0, seed=1) == pytest.approx([0.5, 1.0, 1.5])


def test_nothing_else_that_draws_random_numbers_changes_a_workload():
    before = w1(40, 2.0, seed=1)
    random.seed(5)
    random.random()
    assert w1(40, 2.0, seed=1) == before


def test_w1_has_the_shares_and_steps_of_its_classes_for_every_seed():
    for seed in range(3):
        found = collections.Counter((a.width, a.height, a.steps) for a in w1(600, 1.0, seed))
        assert found == {(512, 512, 20): 90, (768, 768, 20): 150, (1024, 1024, 25): 270, (1536, 1536, 35): 90}
    assert [a.width for a in w1(600, 1.0, 0)] != [a.width for a in w1(600, 1.0, 1)]
    assert {a.width for a in w1(60, 1.0, 0, sizes=workloads.SMALL_SIZES)} == {32, 48, 64, 96}


def test_few_requests_are_dealt_out_too():
    assert len(w1(1, 1.0, 0)) == 1
    assert sum(a.width == 1024 for a in w1(7, 1.0, 0)) == 3


def test_w2_asks_for_the_same_as_w1_at_other_times():
    one, two = w1(300, 1.0, 4), w2(300, 1.0, 4)
    assert [(a.width, a.steps) for a in one] == [(a.width, a.steps) for a in two]
    spread = gaps([a.at_s for a in w2(20_000, 1.0, 4)])
    assert statistics.stdev(spread) / statistics.mean(spread) == pytest.approx(1.64, rel=0.05)
    assert {(a.width, a.steps) for a in w2(9, 1.0, 4, sizes=(512,))} == {(512, 20)}


def test_w3_replays_what_the_file_says_at_the_rate_that_was_asked_for(tmp_path: Path):
    file = write(tmp_path, "100,u1,TXT_2_IMG,30,1,63,26,0,32.0,SUCCEED", "110,u2,IMG_2_IMG,40,4,93,,0,43.0,SUCCEED",
                 "111,u9,TXT_2_IMG,30,1,1,,0,1.0,FAILED", "112,u9,TXT_2_IMG,,1,1,,0,1.0,SUCCEED",
                 "140,u1,TXT_2_IMG,20,2,93,,0,36.0,SUCCEED")  # fmt: skip
    found = w3(file, 3, seed=0, rate=2.0)
    assert [a.at_s for a in found] == pytest.approx([0, 0.25, 1.0])
    assert [(a.user, a.steps, a.images) for a in found] == [("u1", 30, 1), ("u2", 40, 4), ("u1", 20, 2)]
    assert {a.width for a in found} == {512, 1024}
    assert all(a.width == a.height for a in found)


def test_w3_sizes_are_half_and_half_and_a_short_file_is_replayed_again(tmp_path: Path):
    file = write(tmp_path, "5,a,T,30,1,,,,,SUCCEED", "3,b,T,31,1,,,,,SUCCEED", "9,c,T,32,,,,,,SUCCEED")
    found = w3(file, 10, seed=1, rate=0.5, sizes=(32, 64))
    assert collections.Counter(a.width for a in found) == {32: 5, 64: 5}
    assert [a.user for a in found[:6]] == ["b", "a", "c", "b", "a", "c"]  # by arrival, not by line
    times = [a.at_s for a in found]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(9 / 0.5)
    assert len(w3(file, None, seed=1, rate=0.5)) == 3


def test_w3_takes_a_file_without_the_columns_that_it_can_do_without(tmp_path: Path):
    file = write(tmp_path, "0,4", "1,4.0", head="\ufeffarrival_s,num_inference_steps")
    assert w3(file, 2, 0, 1.0, sizes=(8,)) == [Arrival(0, 8, 8, 4), Arrival(1, 8, 8, 4)]
    together = write(tmp_path, "7,4", "7,4", head="arrival_s,num_inference_steps")
    assert [a.at_s for a in w3(together, 2, 0, 1.0)] == [0, 0]


@pytest.mark.parametrize(("row", "said"), [
    ("soon,a,T,30,1,,,,,SUCCEED", r"trace.csv, line 3, column arrival_s: 'soon' is not a number"),
    ("-1,a,T,30,1,,,,,SUCCEED", r"line 3, column arrival_s: '-1'"),
    (",a,T,30,1,,,,,SUCCEED", r"line 3, column arrival_s: ''"),
    ("nan,a,T,30,1,,,,,SUCCEED", r"line 3, column arrival_s: 'nan'"),
    ("1,a,T,many,1,,,,,SUCCEED", r"line 3, column num_inference_steps: 'many' is not a whole number"),
    ("1,a,T,2.5,1,,,,,SUCCEED", r"line 3, column num_inference_steps: '2.5'"),
    ("1,a,T,inf,1,,,,,SUCCEED", r"line 3, column num_inference_steps: 'inf'"),
    ("1,a,T,30,-2,,,,,SUCCEED", r"line 3, column num_images: '-2'"),
])  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path: Path, row: str, said: str):
    file = write(tmp_path, "0,a,T,30,1,,,,,SUCCEED", row)
    with pytest.raises(ConfigError, match=said):
        w3(file, 2, 0, 1.0)


def test_files_that_are_no_trace(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"line 1: there is no column num_inference_steps; it has arrival_s, user"):
        w3(write(tmp_path, "0,a", head="arrival_s,user"), 1, 0, 1.0)
    with pytest.raises(ConfigError, match="no row that succeeded"):
        w3(write(tmp_path, "0,a,T,30,1,,,,,FAILED"), 1, 0, 1.0)
    with pytest.raises(ConfigError, match="line 1: there is no column arrival_s; it has nothing"):
        w3(write(tmp_path, head=""), 1, 0, 1.0)
    with pytest.raises(ConfigError, match=r"absent\.csv: cannot be read"):
        w3(tmp_path / "absent.csv", 1, 0, 1.0)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match=r"picture\.csv: cannot be read as CSV"):
        w3(tmp_path / "picture.csv", 1, 0, 1.0)


def test_w4_is_a_burst():
    assert w4() == [Arrival(0.0, 512, 512, 4)] * 24
    assert w4(2, size=32, steps=9) == [Arrival(0.0, 32, 32, 9)] * 2


@pytest.mark.parametrize(("call", "said"), [
    (lambda: poisson(0, 1.0, 0), "n=0"),
    (lambda: poisson(1, 0.0, 0), "rate=0.0"),
    (lambda: poisson(1, math.nan, 0), "rate=nan"),
    (lambda: gamma(1, 1.0, -1.0, 0), "cv=-1.0"),
    (lambda: w1(1, 1.0, 0, sizes=()), "sizes="),
    (lambda: w1(1, 1.0, 0, sizes=(1, 2, 3, 4, 5)), "one to 4 sizes"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(call, said: str):
    with pytest.raises(ConfigError, match=said):
        call()
