"""`python -m perf`: commands are found, settings parsed, reports printed, saved and drawn; errors are one line."""

import dataclasses
import json
import re
import subprocess
import sys
import types
from html.parser import HTMLParser

import pytest
import tyro
from rich.console import Console

import configs
from perf import command
from perf.command import Command, Output, main
from perf.plot import Point, together
from perf.report import Notes, Plot, Report, Table, duration, html_page, json_text, number, print_report, quantity
from tests.contracts.tree import ROOT


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr), whether main returns or its parser exits."""
    try:
        status = main(list(arguments))
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_python_m_perf():
    result = subprocess.run([sys.executable, "-m", "perf"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and not result.stderr
    for known in command.COMMANDS:
        assert f"  {known.name} " in result.stdout and known.summary in result.stdout


def test_help_is_no_error(capsys):
    assert run(capsys, "--help")[0] == 0
    status, out, _ = run(capsys, "roofline", "--help")
    assert status == 0 and "--chip" in out and "--json" in out and "--html" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["roofln"], "unknown command 'roofln'; commands: roofline"),
        (["roofline"], "name a config; configs: dense-1b, "),
        (["roofline", "llama"], "unknown config 'llama'; known: dense-1b, "),
        (["roofline", "dense-1b", "--chip", "h1000"], "unknown chip 'h1000'; chips: v100-sxm2, "),
        (["roofline", "dense-1b", "--chip", "v100"], "set --compute to one of: fp16, fp32"),
        (["roofline", "smollm2"], "has its architecture in its weights"),
        (["roofline", "smollm2", "--mode", "train"], "served and not trained"),
        (["roofline", "dense-1b", "--batch", "0"], "--batch 0 must be at least 1"),
        (["roofline", "dense-1b", "--context", "-1"], "--context -1 at least 0"),
        (["roofline", "dense-1b", "--mode", "prefill", "--seq", "0"], "--seq 0 at least 1"),
        (["roofline", "dense-1b", "--devices", "0"], "--devices 0"),
        (["roofline", "dense-1b", "--context", "8193"], "longer than the model's max_positions=8192"),
        (["roofline", "dense-1b", "--seq", "5"], "--seq 5 has no meaning in --mode decode"),
        (
            ["roofline", "dense-1b", "--mode", "train", "--weights", "int8"],
            "--weights int8 has no meaning in --mode train",
        ),
        (["roofline", "dense-1b", "--mode", "train", "--context", "0"], "--context 0 has no meaning in --mode train"),
        (["roofline", "dense-1b", "--remat", "full"], "--remat full has no meaning in --mode decode"),
        (["roofline", "dense-1b", "--group", "0"], "--group 0"),
        (["roofline", "dense-1b", "--launch-us", "-1"], "--launch-us -1"),
        (["roofline", "dense-1b", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json is not a file"),
        (["roofline", "dense-1b", "--html", "-"], "--html - is not a file"),
    ],
)
def test_a_wrong_setting_is_one_line_on_stderr(capsys, arguments, said):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("wrong", [["--mode", "serve"], ["--bach", "1"], ["--batch", "many"]])
def test_what_no_parser_takes_exits_with_2_and_names_it(capsys, wrong):
    status, _, err = run(capsys, "roofline", "dense-1b", *wrong)
    assert status == 2 and wrong[0] in err and "Traceback" not in err


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
@pytest.mark.parametrize("name", [name for name in configs.names() if name != "smollm2"])
def test_every_config_in_120_columns(capsys, name, mode):
    status, out, err = run(capsys, "roofline", name, "--mode", mode, "--devices", "4")
    assert status == 0 and err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "(prediction)" in " ".join(lines[:2])
    # Nothing was cut off, nor a cell broken over two lines.
    assert "…" not in out
    names = [
        line.split()[0] for line in lines if re.match(r"(qkv|query|attention|down|expert_down|lm_head|total) ", line)
    ]
    assert {"attention", "lm_head", "total", "query" if mode == "train" else "qkv"} <= set(names)


def test_train_mode_takes_the_run(capsys):
    status, out, _ = run(
        capsys, "roofline", "llama3-8b", "--mode", "train", "--chip", "v5p", "--devices", "64", "--json", "-"
    )
    record = json.loads(out)
    assert status == 0
    assert (record["batch"], record["length"], record["remat"], record["compute_dtype"]) == (
        64,
        8192,
        "full",
        "bfloat16",
    )
    out = run(capsys, "roofline", "quickstart", "--mode", "train", "--json", "-")[1]
    assert json.loads(out)["compute_dtype"] == "float32"


def test_serving_settings_reach_the_answer(capsys):
    settings = ("--weights", "int4", "--cache", "int8", "--batch", "16", "--context", "100", "--group", "64")
    record = json.loads(run(capsys, "roofline", "llama3-8b", *settings, "--json", "-")[1])
    assert (record["weight_format"], record["cache_format"], record["batch"], record["length"]) == (
        "int4",
        "int8",
        16,
        100,
    )
    assert (record["scales_counted"], record["scale_group"]) == (True, 64)
    plain = json.loads(run(capsys, "roofline", "llama3-8b", *settings, "--no-scales", "--json", "-")[1])
    weights = [sum(op["weights_bytes_per_device"] for op in one["ops"]) for one in (record, plain)]
    # Groups of 64 share 16 bits.
    assert weights[0] / weights[1] == pytest.approx((4 + 16 / 64) / 4, rel=1e-3)
    assert record["chip"] == "H100 SXM" and record["num_devices"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quickstart",), "the required bytes may stay on the chip (52.4 MB)"),
        (("llama3-8b", "--devices", "16"), "8 kv heads do not divide over 16 devices"),
        (("mixtral-8x7b",), "uniformly and independently"),
        (("dense-1b", "--mode", "train"), "fits unknown: "),
        (("quickstart", "--mode", "train"), "Newton-Schulz iteration are not counted"),
        (("dense-1b",), "V100 SXM2: no dense bfloat16 peak is published; published: float16, float32"),
        (("dense-1b", "--mode", "prefill"), "attention of one layer and one sequence of 4096 tokens, forward: "),
    ],
)
def test_what_is_assumed_is_said_where_it_matters(capsys, arguments, said):
    out = " ".join(run(capsys, "roofline", *arguments)[1].split())
    assert said in out
    plain = " ".join(run(capsys, "roofline", "llama3-8b", "--chip", "v100", "--compute", "fp16")[1].split())
    assert said not in plain


class Page(HTMLParser):
    """Tags of a page, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.loads.append(value)


def test_the_page_is_self_contained(capsys, tmp_path):
    page, data = tmp_path / "page.html", tmp_path / "figures.json"
    status, out, _ = run(capsys, "roofline", "moe-1b", "--html", str(page), "--json", str(data))
    assert status == 0 and "expected experts" in out
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.tags.count("svg") == 1 and parsed.tags.count("table") == out.count("───\n")
    assert not parsed.loads and "<script" not in text and "@import" not in text
    for chip in ("H100 SXM", "TPU v5e", "MI300X"):
        assert f">{chip} (ridge" in text
    assert json.loads(data.read_text(encoding="utf-8"))["config"] == "moe-1b"
    again = tmp_path / "again.html"
    run(capsys, "roofline", "moe-1b", "--html", str(again))
    assert again.read_text(encoding="utf-8") == text


# The frame, with a command of its own.


@dataclasses.dataclass(frozen=True)
class Add(Output):
    numbers: tyro.conf.Positional[tuple[int, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Check(Output):
    limit: int = 3


def add_or_check(settings: Add | Check) -> Report:
    if isinstance(settings, Check):
        return Report("check", {"limit": settings.limit, "value": None, "reason": "<none>"}, [], status=1)
    table = Table(
        "sum of <all>", ("what", "value"), (("a & b [i]", "1"), ("all", str(sum(settings.numbers)))), totals=1
    )
    notes = Notes("how", ("[bold]by hand[/bold]",))
    return Report("sums", {"sum": sum(settings.numbers)}, [table, notes, Plot("none", lambda: "<svg></svg>")])


@pytest.fixture
def sums(monkeypatch):
    module = types.ModuleType("a_command_for_tests", "Adds or checks.")
    module.Settings, module.report = Add | Check, add_or_check
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "COMMANDS", (*command.COMMANDS, Command("sums", "adds", module.__name__)))


def test_a_union_of_settings_becomes_subcommands(capsys, sums, tmp_path):
    status, out, _ = run(capsys, "sums", "add", "1", "2", "--html", str(tmp_path / "sums.html"))
    assert status == 0 and re.search(r"^all +3$", out, re.MULTILINE)
    # Nothing in a cell or a note is markup, neither of the terminal's nor of the page's.
    assert "- [bold]by hand[/bold]" in out and "a & b [i]" in out
    page = (tmp_path / "sums.html").read_text()
    assert "sum of &lt;all&gt;" in page and '<td class="text">a &amp; b [i]</td>' in page
    assert '<tr class="total"><td class="text">all</td><td>3</td></tr>' in page and "<svg></svg>" in page
    status, out, _ = run(capsys, "sums", "check", "--json", "-")
    assert status == 1 and json.loads(out) == {"limit": 3, "value": None, "reason": "<none>"}
    assert run(capsys, "sums")[0] == 2


def test_the_path_is_checked_before_the_work(capsys, sums, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["a_command_for_tests"], "report", lambda settings: pytest.fail("worked"))
    status, _, err = run(capsys, "sums", "check", "--html", str(tmp_path))
    assert status == 2 and "--html" in err


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        json_text(Report("x", {"value": float("nan")}, []))


def test_a_terminal_gets_no_plots_and_a_page_does():
    report = Report("x", {}, [Plot("p", lambda: pytest.fail("drawn"))])
    with Console(record=True, width=80, quiet=True) as console:
        print_report(report, console)
    with pytest.raises(pytest.fail.Exception):
        html_page(report)


def test_numbers_for_people():
    assert [quantity(v, "B") for v in (0, 5, 1500, 999.6e6, 17.54e9, 2.5e15)] == [
        "0 B",
        "5 B",
        "1.5 kB",
        "1 GB",
        "17.5 GB",
        "2.5 PB",
    ]
    assert [duration(v) for v in (5.2e-6, 5.24e-3, 0.9999, 12.0, 0.0)] == ["5.2 µs", "5.24 ms", "1 s", "12 s", "0 µs"]
    assert [number(v) for v in (1432.4, 100, 99.94, 5.239, 0.00001)] == ["1,432", "100", "99.9", "5.24", "0.000"]
    assert quantity(None) == duration(None) == number(None) == "n/a"


def test_marks_that_cover_each_other_share_a_label():
    points = [Point("up", 100.0, 1.0), Point("qk", 3.0, 1.0), Point("gate", 99.0, 1.1), Point("far", 100.0, 9.0)]
    assert [point.name for point in together(points)] == ["qk", "gate, up", "far"]
