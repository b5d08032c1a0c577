"""The page about a run: complete, made from files alone, and in need of nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loomtune.errors import UserError
from loomtune_plugins.charts import smoothed, thinned
from loomtune_plugins.trackers.jsonl import Jsonl
from loomtune_plugins.trackers.report import Report
from loomtune_plugins.trackers.settings import JsonlSettings, ReportSettings

VOID = {"meta", "br", "img", "link"}


class Outline(HTMLParser):
    """Checks that elements close, and keeps ids, attributes that lead elsewhere, and the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src") and not (value or "").startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report() -> Report:
    return Report(ReportSettings())


@pytest.fixture
def finished(story) -> Path:
    told = story(jsonl=Jsonl(JsonlSettings()))
    told.evaluated(0, sql_accuracy_before=0.0625)
    for step in range(1, 5):
        told.step(step, tokens_seen=100.0 * step)
    told.evaluated(4, sql_accuracy=0.8125)
    told.end()
    folder: Path = told.run.folder
    (folder / "run.yaml").write_text(
        "plugins: {loomtune_plugins.models: loomtune 0.1.0}\n"
        "settings: {optimizer: {name: adamw, lr: 0.001}, data: {api_key: sk-secret, path: '<b>rows</b>'}}\n"
    )
    (folder / "result.json").write_text(json.dumps({"status": "completed", "step": 4, "metrics": {}, "error": None}))
    return folder


def test_the_page_says_what_happened(finished: Path) -> None:
    page = Outline(report().render(finished))
    text = " ".join(page.text)
    for said in (
        "a-run",
        "completed",
        "Loss",
        "Gradient norm",
        "Learning rate",
        "sql_accuracy",
        "optimizer.lr",
        "0.001",
    ):
        assert said in text
    assert "loomtune 0.1.0" in text
    assert not page.open


def test_before_and_after_are_bars_with_their_values(finished: Path) -> None:
    html = report().render(finished)
    bars = html[html.index("Before and after") : html.index("Training")]
    assert bars.count("<figure>") == 1 and "<!-- 0.0625 -->" in bars and "<!-- 0.8125 -->" in bars


def test_the_page_needs_nothing_beside_it(finished: Path) -> None:
    html = report().render(finished)
    assert Outline(html).links == []
    assert not re.search(r"https?://|@import|<script|<link", html)


def test_ids_of_one_chart_are_not_those_of_another(finished: Path) -> None:
    clips = re.findall(r'<clipPath id="([^"]+)"', report().render(finished))
    assert len(clips) == len(set(clips)) > 1


def test_secrets_and_markup_of_settings_do_not_reach_the_page(finished: Path) -> None:
    html = report().render(finished)
    assert "sk-secret" not in html and "<b>rows</b>" not in html and "&lt;b&gt;rows&lt;/b&gt;" in html


def test_a_failed_run_says_why(finished: Path) -> None:
    (finished / "result.json").write_text(json.dumps({"status": "failed", "error": "RunFailed: lost rank 3"}))
    text = " ".join(Outline(report().render(finished)).text)
    assert "failed" in text and "RunFailed: lost rank 3" in text


def test_the_tracker_writes_the_page_when_the_run_ends(story) -> None:
    told = story(jsonl=Jsonl(JsonlSettings()), report=report())
    told.step(1)
    told.end("stopped")
    assert "stopped" in (told.run.folder / "report.html").read_text()


def test_a_loss_that_was_not_finite_leaves_a_gap_and_no_error(story) -> None:
    told = story(jsonl=Jsonl(JsonlSettings()))
    for step, loss in enumerate((2.0, math.nan, 1.0), start=1):
        told.step(step, loss=loss)
    assert "<svg" in report().render(told.run.folder)


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics"):
        report().render(tmp_path)


def test_long_curves_are_averaged_and_short_ones_kept() -> None:
    points = [(float(step), float(step % 2)) for step in range(1, 1001)]
    assert thinned(points, 2000) == points
    assert thinned(points, 10)[0] == (50.5, 0.5) and len(thinned(points, 10)) == 10


def test_a_smooth_line_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smoothed([5.0, *[0.0] * 199])[0] == pytest.approx(5.0)


def used(story, **more: float) -> Path:
    """A run whose steps say what they used."""
    told = story(jsonl=Jsonl(JsonlSettings()))
    for step in range(1, 6):
        phases = {"seconds/forward": 0.2, "seconds/backward": 0.25, "seconds/other": 0.05}
        checkpoint = {"seconds/checkpoint": 0.1} if step == 3 else {}
        told.step(step, memory_bytes=3 * 2**30, all_tokens_per_second=2000.0, **phases, **checkpoint, **more)
    told.end()
    folder: Path = told.run.folder
    return folder


def planned(folder: Path, **tree: object) -> str:
    (folder / "plan.json").write_text(json.dumps(tree))
    html = report().render(folder)
    begin = html.index("<details open><summary>Foretold and measured")
    return " ".join(Outline(html[begin : html.index("</details>", begin)]).text)


def test_where_the_time_went_is_one_chart_and_no_curve_for_each_phase(story) -> None:
    html = report().render(used(story, mfu=0.41))
    captions = re.findall("<figcaption>([^<]*)", html)
    assert captions.count("Seconds a step by phase") == 1
    assert not any("seconds/" in caption for caption in captions)
    assert "Before and after" not in html, "a phase that not every step has is no evaluation"
    assert "MFU of the last step" in html and "41.0%" in html


def test_what_was_foretold_stands_beside_what_was_measured(story) -> None:
    folder = used(story, **{"memory_bytes/forward": 2.0 * 2**30, "mfu": 0.4})
    text = planned(
        folder,
        memory={"peak_bytes": 4 * 2**30},
        time={"step_seconds": [0.4, 0.6], "tokens_per_second": [2500, 3000]},
        compute={"mfu": [0.2, 0.3], "mfu_palm": None},
    )
    for said in ("4.00 GiB 3.00 GiB -25.0% in training", "0.4 s to 0.6 s 0.5 s within", "2,500 to 3,000 2,000 -20.0%"):
        assert said in text
    assert "20.0% to 30.0% 40.0% +33.3%" in text and "PaLM" not in text


def test_a_dry_steps_peak_is_its_highest_ranks(story) -> None:
    folder = used(story, **{"memory_bytes/forward": 1.0})
    (folder / "measured.json").write_text(json.dumps({"dry_step": {"peak_bytes": [2**30, 2 * 2**30]}}))
    assert "1.00 GiB 2.00 GiB +100.0% in the dry step" in planned(folder, memory={"peak_bytes": 2**30})


def test_a_process_resident_set_is_not_compared_with_an_allocators_peak(story) -> None:
    text = planned(used(story), memory={"peak_bytes": 2**30}, time=None, compute=None)
    assert "1.00 GiB 3.00 GiB of the process, libraries and all" in text and "%" not in text


def test_without_a_plan_nothing_is_foretold(story) -> None:
    folder = used(story)
    assert "Foretold" not in report().render(folder)
    (folder / "plan.json").write_text('{"torn')
    assert "Foretold" not in report().render(folder)
