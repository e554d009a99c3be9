"""``jagtile report``: the numbers of its page, and that the page needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from jagtile.generator.bench_types import BenchReport, PeerResult, Plan, describe
from jagtile.generator.importance import MIN_CONFIGS, as_key, importances
from jagtile.generator.report import collect
from jagtile.generator.report_page import HEIGHT, WIDTH, page, plot
from jagtile.generator.roofline import CLOCK_GHZ, EXPONENTIALS, MMA_FLOPS
from jagtile.generator.spec import KernelSpec
from jagtile.generator.tile import legal_configs, spaces_of
from jagtile.generator.workloads import Workload, representative
from jagtile.runtime.settings import settings
from jagtile.tuning_db.schema import ChoiceEntry, Choices, DeviceFacts, TuningRecord
from jagtile.tuning_db.store import Database

SPEC = KernelSpec.parse("fwd_bf16_d128")
FACTS = DeviceFacts(
    slug="sm90-100sm", label="Hopper <test>", target="sm_90a", units=100, bandwidth_gbs=1000.0, compute_capability="9.0"
)
CPU = DeviceFacts(slug="cpu-x", label="A CPU", target="cpu", units=2, bandwidth_gbs=0.0, compute_capability="generic")
CONFIGS = legal_configs(spaces_of("sm_90a", SPEC)[0], SPEC)
HUGE = representative(SPEC, "huge", "sm_90a")[0]
TIMES = (400.0, None, 300.0, 350.0, 200.0)


def _record(config, us, second, **fields):
    known = {"device": FACTS.slug, "target": "sm_90a", "spec": SPEC.name, "regime": "huge", "workload": HUGE.name}
    known |= {"config": config.to_dict(), "date": f"2026-01-01T00:00:{second:02}", "state": "ok" if us else "crash"}
    return TuningRecord(**{**known, "time_us": us, **fields})


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "user", tmp_path / "shipped")
    with made.writer(FACTS.slug, ship=False) as writer:
        for place, us in enumerate(TIMES):
            writer.append(_record(CONFIGS[place], us, place))
        writer.append(_record(CONFIGS[0], 1.0, 20))  # measured anew: no new trial
        writer.append(_record(CONFIGS[4], 210.0, 30, phase="final", tflops=7.0))
    entry = ChoiceEntry(default=CONFIGS[4].to_dict())
    made.write_choices(Choices(device=FACTS, specs={f"sm_90a/{SPEC.name}": entry}), ship=False)
    return made


def _bench(device=FACTS, **peers):
    results = tuple(PeerResult(peer=name.replace("_", "-"), **values) for name, values in peers.items())
    return BenchReport(
        device=device,
        driver="580",
        torch="2.11",
        jagtile="0",
        date="2026-01-01",
        plan=Plan(),
        seed=0,
        workloads=(describe(Workload("w", (100,), (100,), 4, 2, 128, 128), "bf16", peers=results),),
    )


def test_the_fraction_is_the_slowest_units_time_over_the_measured_one(database):
    (report,) = collect(database, [])
    (achieved,) = report.achieved
    assert (achieved.regime, achieved.config, achieved.us, achieved.tflops) == ("huge", CONFIGS[4].name, 210.0, 7.0)
    tensor_us = HUGE.flops / (MMA_FLOPS * FACTS.units * CLOCK_GHZ * 1e3)
    exp_us = HUGE.num_heads * HUGE.pairs / (EXPONENTIALS * FACTS.units * CLOCK_GHZ * 1e3)
    assert tensor_us > exp_us
    assert achieved.bound == "tensor"
    assert achieved.fraction == pytest.approx(tensor_us / 210.0)
    assert achieved.stale  # the record names no source


def test_the_history_has_each_config_once_and_the_best_so_far(database):
    (history,) = collect(database, [])[0].histories
    assert [trial.us for trial in history.trials] == list(TIMES)
    assert [trial.best_us for trial in history.trials] == [400.0, 400.0, 300.0, 300.0, 200.0]
    drawn = plot(history)
    assert (len(drawn.dots), len(drawn.failures)) == (4, 1)
    assert drawn.dots[3][1] == HEIGHT - 4  # the best one is at the bottom
    assert drawn.dots[0][1] == drawn.dots[2][1] == 4  # far slower ones at the edge
    corners = [tuple(map(float, point.split(","))) for point in drawn.line.split()]
    assert [x for x, _ in corners] == [0, WIDTH * 4 / 5, WIDTH * 4 / 5, WIDTH]
    assert corners[-1][1] == HEIGHT - 4


def test_a_peers_time_is_told_in_proportion_to_ours_or_its_state(database):
    peers = {
        "jagtile": {"state": "ok", "ms": 0.01, "tflops": 3.0, "ratio": 1.0},
        "fa3": {"state": "ok", "ms": 0.02, "ratio": 2.0},
        "torch_njt": {"state": "refused", "reason": "no"},
    }
    (report,) = collect(database, [_bench(**peers)])
    (row,) = report.benches[0].rows
    assert (row.ours_ms, row.ratios) == (0.01, {"fa3": 2.0, "torch-njt": "refused"})
    assert 0 < row.fraction < 1
    html = page([report])
    assert "<td>2.00</td>" in html
    assert "<td>refused</td>" in html


def test_a_cpu_has_no_roofline_and_may_be_known_by_its_results_alone(database):
    reports = collect(database, [_bench(CPU, jagtile={"state": "ok", "ms": 1.0})])
    assert [report.device.slug for report in reports] == ["cpu-x", FACTS.slug]
    assert reports[0].benches[0].rows[0].fraction is None
    assert "A CPU" in page(reports)


def test_the_knob_that_matters_is_the_most_important():
    configs = [{"algorithm": "a", "x": x, "y": y} for x in range(8) for y in range(8)]
    shares = importances({as_key(config): 10 + config["x"] + 0.01 * config["y"] for config in configs})
    assert list(shares) == ["x", "y"]  # what never varies is left out
    assert shares["x"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert importances({as_key(config): 1.0 for config in configs[: MIN_CONFIGS - 1]}) == {}


class Elements(HTMLParser):
    """Every element closed, in order; the text and the attributes of all."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_shipped_records_make_one_page_that_needs_nothing_else(run, tmp_path):
    path = tmp_path / "report.html"
    with settings.override(cache_dir=tmp_path / "none"):
        run("report", "-o", str(path), "--device", "sm90-132sm")
        first = path.read_bytes()
        run("report", "-o", str(path), "--device", "sm90-132sm")
    assert path.read_bytes() == first
    assert len(first) < 2_000_000
    html = first.decode()
    elements = Elements(html)
    assert elements.open == []
    tags = [tag for tag, _ in elements.seen]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    for _, attributes in elements.seen:
        assert not attributes.keys() & {"src", "onload", "onclick"}
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in html
    assert "@import" not in html
    studies = {
        (r.spec, r.regime, r.workload)
        for r in Database().records("shipped", device="sm90-132sm")
        if r.phase == "search"
    }
    assert tags.count("svg") == len(studies)
    assert len(re.findall('class="bar"><div', html)) >= len(studies) // 2


def test_what_is_on_record_can_not_break_the_page(database):
    html = page(collect(database, []))
    assert "Hopper &lt;test&gt;" in html
    assert "Hopper <test>" not in html
    assert Elements(html).open == []


def test_results_are_read_from_files(run, tmp_path):
    results, path = tmp_path / "results.json", tmp_path / "report.html"
    results.write_bytes(msgspec.json.encode(_bench(jagtile={"state": "ok", "ms": 0.5, "ratio": 1.0})))
    with settings.override(cache_dir=tmp_path / "none"):
        assert FACTS.slug in run("report", str(results), "--device", FACTS.slug, "-o", str(path)).output
    assert ">0.5</td>" in path.read_text()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("{}", (), "holds no results of `jagtile bench -o`"),
        ("\udcff", (), "holds no results"),
        (None, ("--device", "sm1-1sm"), "no device sm1-1sm is on record or in RESULTS; there are"),
        (None, ("-o", "/dev/null/report.html"), "/dev/null"),
    ],
)
def test_a_bad_request_exits_with_1_and_says_what_is_wrong(run, tmp_path, content, arguments, message):
    if content is not None:
        path = Path(tmp_path / "results.json")
        path.write_bytes(content.encode(errors="surrogateescape"))
        arguments = (str(path), *arguments)
    assert message in run("report", *arguments, code=1).output
