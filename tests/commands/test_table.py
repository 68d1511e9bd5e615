"""`atmc table`: expressions, columns, formats, the results it finds, and the pages under results/."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call, expect_refusal

from atmc.commands.expressions import Scope, evaluate, parse, render
from atmc.commands.pages import fill_page
from atmc.commands.rows import default_columns, draw_table, parse_column, parse_columns, read_results
from atmc.commands.seeds import compare_members

RESULTS = Path(__file__).parents[2] / "results"
PAGES = [RESULTS.parent / "README.md"]
PAGES += sorted(path for path in RESULTS.glob("*/*.md") if "<!-- table: " in path.read_text(encoding="utf-8"))


def accuracy(value, n=360):
    return {"accuracy": value, "n": n, "ci95": [round(value - 0.02, 4), round(value + 0.01, 4)]}


def metrics(**changes):
    return {
        "method": "atmc",
        "threat": "linf:0.2",
        "file_bytes": 3921,
        "nonzeros": 1980,
        "dense_weights": 430500,
        "bits": 4,
        "clean": accuracy(0.975),
        "attacks": {"pgd": accuracy(0.71), "pgd-strong": accuracy(0.7, 100)},
        "checks": [{"name": "square", "ok": False}, {"name": "more_steps", "ok": True}],
        "max_bytes": None,
    } | changes


def write_run(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics(**changes)))


def value(source, **names):
    return evaluate(parse(source), Scope([names or metrics()]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nonzeros", 1980),
        ("attacks.pgd.accuracy", 0.71),
        ("attacks.pgd-strong.n", 100),
        ("attacks['pgd-strong'].n", 100),
        ("nonzeros-bits", None),  # one name with a hyphen
        ("nonzeros - bits", 1976),
        ("clean.ci95[-1]", 0.985),
        ("clean.ci95[2]", None),
        ("8 * file_bytes / nonzeros", 8 * 3921 / 1980),
        ("-(file_bytes // 1000) + 1", -2),
        ("bits / 0", None),
        ("max_bytes * 2", None),
        ("max_bytes or file_bytes", 3921),
        ("bits and method", "atmc"),
        ("not bits", False),
        ("1 < bits <= 4", True),
        ("max_bytes < 1", False),
        ("max_bytes == None", True),
        ("'a' if bits == 32 else 'b'", "b"),
        ("[check.name for check in checks if check.ok]", ["more_steps"]),
        ("[a * b for a in [1, 2] for b in [10, 20]]", [10, 20, 20, 40]),
        ("max(b for b in [2, bits, max_bytes])", 4),
        ("min([])", None),
        ("mean([1, 2])", 1.5),
        ("mean([])", None),
        ("median([3, 1, 2, 4])", 3),
        ("round(1 / 3, 2)", 0.33),
        ("len(checks)", 2),
        ("len(max_bytes)", None),
        ("join(' ', [1, 'b'])", "1 b"),
        ("replace(split(threat, ':')[0], 'l', 'L')", "Linf"),
        ("failed(checks)", "`square`"),
        ("failed([])", "not run"),
        ("interpolate([[0, 1], [10, 2]], 5)", 1.5),
        ("interpolate([[1, 1], [10, 2]], 11)", None),
        ("bold(threat, bits > 3)", "**linf:0.2**"),
        ("bold(threat, bits > 4)", "linf:0.2"),
        ("f'{clean.accuracy:.1%} at {bits} bits, {max_bytes:,}'", "97.5% at 4 bits, –"),
    ],
)
def test_expressions(source, expected):
    assert value(source) == expected


def test_missing_names_of_one_row_are_no_error_if_another_row_has_them():
    rows = [[{"a": {"b": 1}}], [{"a": {}}], [{"a": None}], [{}]]
    assert draw_table(rows, parse_columns("a.b"), "csv").split() == ["a.b", "1", '""', '""', '""']


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("nonzero", "unknown column 'nonzero': expected one of .*; did you mean 'nonzeros'\\?"),
        ("attacks.pdg", "unknown column 'attacks.pdg': expected one of attacks.pgd.*did you mean 'attacks.pgd'\\?"),
        ("nonzeros +", "cannot read the expression 'nonzeros \\+'"),
        ("means(bits)", "unknown function 'means'.*did you mean 'mean'"),
        ("bits.x", "there is no bits.x: '4' has no names below it"),
        ("clean + 1", "'clean \\+ 1' calculates with something that is not a number"),
        ("threat < 1", "compares values of different kinds"),
        ("len(1)", "the arguments of 'len\\(1\\)' do not fit"),
        ("attacks", "an object with pgd, pgd-strong is no single value"),
        ("threat:.2f", "column 'threat': the format '.2f' does not fit 'linf:0.2'"),
    ],
)
def test_errors_are_one_sentence(columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_table([[metrics()]], parse_columns(columns))


@pytest.mark.parametrize(
    "source",
    [
        "().__class__",
        "__import__('os')",
        "(lambda: 1)()",
        "[].append(1)",
        "2 ** 9",
        "'a' @ 'b'",
        "f'{bits!r}'",
        "bits.__class__",
    ],
)
def test_no_code_runs(source):
    with pytest.raises(ValueError, match=r"cannot contain|unknown function|has no names below it"):
        value(source)


def test_columns_are_split_at_commas_that_separate_them():
    columns = parse_columns(
        "run, k / N=nonzeros / dense_weights:.4f, file_bytes:,,a: b=f'{x:.1f}, {y}', x=a if b == 'c,d' else e"
    )
    assert [(column.title, column.spec) for column in columns] == [
        ("run", ""),
        ("k / N", ".4f"),
        ("file_bytes", ","),
        ("a: b", ""),
        ("x", ""),
    ]


@pytest.mark.parametrize(
    ("shown", "spec", "text"),
    [
        (None, ".2f", "–"),
        (accuracy(0.975), "", "97.50 [95.50, 98.50] of 360"),
        (accuracy(0.975), "interval", "97.50 [95.50, 98.50]"),
        (accuracy(0.975), ".1%", "97.5%"),
        (12345, ",", "12,345"),
        (True, "", "yes"),
        ([1.5, None], "", "1.5, –"),
        ("dense", "code", "`dense`"),
    ],
)
def test_render(shown, spec, text):
    assert render(shown, spec) == text


def test_default_columns_show_what_some_run_has(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b" / "c", bits=None, attacks={"autoattack": accuracy(0.5)}, checks=[])
    rows = read_results([tmp_path])
    lines = draw_table(rows, default_columns(rows), align=False).splitlines()
    assert lines == [
        "| run | method | threat | file bytes | nonzeros | bits | clean | pgd | pgd-strong | autoattack "
        "| failed checks |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| a | atmc | linf:0.2 | 3,921 | 1,980 | 4 | 97.50 [95.50, 98.50] of 360 | 71.00 [69.00, 72.00] of 360 "
        "| 70.00 [68.00, 71.00] of 100 | – | `square` |",
        "| b/c | atmc | linf:0.2 | 3,921 | 1,980 | – | 97.50 [95.50, 98.50] of 360 | – | – "
        "| 50.00 [48.00, 51.00] of 360 | not run |",
    ]


def test_proofs_have_columns_where_there_are_any(tmp_path):
    write_run(tmp_path / "a", certified=accuracy(0.6) | {"undecided": 0.05}, attacked=accuracy(0.65))
    rows = read_results([tmp_path])
    lines = draw_table(rows, default_columns(rows), align=False).splitlines()
    assert "| pgd-strong | certified | attacked | failed checks |" in lines[0]
    assert "| 60.00 [58.00, 61.00] of 360 | 65.00 [63.00, 66.00] of 360 |" in lines[2]


def test_results_of_runs_and_of_evaluations(tmp_path):
    write_run(tmp_path / "runs" / "a")
    evaluation = tmp_path / "runs" / "dense.json"
    evaluation.write_text(json.dumps({"clean": accuracy(0.9), "attacks": {}}))
    (tmp_path / "runs" / "other.json").write_text("[1]")
    write_run(tmp_path / "more" / "a")

    def names(*paths):
        return [row[1]["run"] for row in read_results(paths)]

    assert names(tmp_path / "runs") == ["a", "dense"]
    assert names(tmp_path / "runs" / "a", evaluation) == ["a", "dense"]
    assert names(tmp_path / "runs" / "a" / "metrics.json") == ["a"]
    both = names(tmp_path / "runs", tmp_path / "more")
    assert both == [str(tmp_path / "runs" / "a"), "dense", str(tmp_path / "more" / "a")]


def test_csv_has_raw_values_and_four_columns_per_accuracy():
    rows = [[metrics()], [metrics(clean=None)]]
    text = draw_table(rows, parse_columns("size=file_bytes:,, clean, check=failed(checks)"), "csv")
    assert list(csv.DictReader(io.StringIO(text))) == [
        {
            "size": "3921",
            "clean": "0.975",
            "clean_low": "0.955",
            "clean_high": "0.985",
            "clean_n": "360",
            "check": "square",
        },
        {"size": "3921", "clean": "", "clean_low": "", "clean_high": "", "clean_n": "", "check": "square"},
    ]


def test_markdown_escapes_bars_and_aligns():
    assert draw_table([[{"a": "x|y"}], [{"a": 1}]], parse_columns("a")) == "| a    |\n|------|\n| x\\|y |\n| 1    |\n"


def test_latex_escapes():
    columns = [parse_column("a & b=bold(text, True)"), parse_column("n")]
    text = draw_table([[{"text": "5 % of `a_b`", "n": None}]], columns, "latex")
    assert r"a \& b & n \\" in text
    assert r"\textbf{5 \% of \texttt{a\_b}} & -- \\" in text


def test_command_prints_and_writes(tmp_path, capsys):
    write_run(tmp_path / "a")
    assert call("table", tmp_path / "a", "--columns", "run,bits") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| a   | 4    |"
    out = tmp_path / "table.csv"
    assert call("table", tmp_path, "--columns", "run", "--columns", "bits", "--format", "csv", "--out", out) == 0
    assert out.read_text() == "run,bits\na,4\n"
    assert "add --overwrite" in expect_refusal(capsys, "table", tmp_path, "--out", out)


def test_command_runs_without_torch(tmp_path):
    write_run(tmp_path / "a")
    code = "import sys; from atmc.cli.main import app; app(sys.argv[1:], standalone_mode=False); assert 'torch' not in "
    code += "sys.modules"
    subprocess.run([sys.executable, "-c", code, "table", tmp_path], check=True)


def test_command_refuses(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "a")
    assert "results to compare" in expect_refusal(capsys, "table")
    assert "leave out --columns" in expect_refusal(capsys, "table", "--page", "a.md", "--columns", "run")
    assert "there is no file or folder" in expect_refusal(capsys, "table", tmp_path / "nothing")
    assert "holds no run" in expect_refusal(capsys, "table", tmp_path / "empty")
    assert "is not JSON" in expect_refusal(capsys, "table", tmp_path / "bad.json")
    assert "holds no result" in expect_refusal(capsys, "table", tmp_path / "list.json")
    assert "unknown format 'cvs'" in expect_refusal(capsys, "table", tmp_path / "a", "--format", "cvs")
    assert "did you mean 'bits'" in expect_refusal(capsys, "table", tmp_path / "a", "--columns", "bit")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_committed_pages_show_the_figures_of_their_json_files(page):
    filled = fill_page(page)
    assert filled.text == page.read_text(encoding="utf-8")
    for path, text in filled.files.items():
        assert text == path.read_text(encoding="utf-8")


PAGE = "# Runs\n\n<!-- table: runs -->\nold\n<!-- end of table -->\n\nText.\n"


def test_page_with_joined_grouped_and_sorted_rows(tmp_path):
    for run, bits, speed in (("a", 4, 1.0), ("b", 8, 3.0), ("c", 4, 2.0)):
        write_run(tmp_path / run, bits=bits)
        (tmp_path / run / "log.jsonl").write_text(f'{{"seconds": {speed}}}\n{{"seconds": {speed + 1}}}\n')
        (tmp_path / run / "config.toml").write_text(f"[training]\nrho = {10 * speed}\n")
    page = tmp_path / "page.md"
    page.write_text(
        PAGE + PAGE.replace("runs", "epochs") + PAGE.replace("runs", "means") + PAGE.replace("runs", "note")
    )
    (tmp_path / "tables.toml").write_text(
        """
        [define]
        size = "file_bytes - 1"

        [runs]
        sources = ["*/metrics.json"]
        join = { log = 'f"{run}/log.jsonl"', config = 'f"{run}/config.toml"', other = '"none.json"' }
        where = "run != 'b'"
        sort = ["-log[0].seconds"]
        columns = ["run", "size", "s=log[-1].seconds", "rho=config.training.rho", "other"]
        file = "runs.csv"

        [epochs]
        sources = ["a/metrics.json"]
        rows = ["attacks"]
        columns = ["attack=key", "n", "run"]

        [means]
        sources = ["*/metrics.json"]
        group = ["bits"]
        columns = ["bits", "runs=len(members)", "bytes=mean([member.file_bytes for member in members])"]

        [note]
        sources = ["b/metrics.json"]
        text = 'f"{bits} bits"'
        """
    )
    assert call("table", "--page", page) == 0
    blocks = [block.split("<!-- end")[0].strip().splitlines() for block in page.read_text().split(" -->\n")[1::2]]
    assert blocks[0][2:] == ["| c | 3920 | 3.0 | 20.0 | – |", "| a | 3920 | 2.0 | 10.0 | – |"]
    assert blocks[1][2:] == ["| pgd | 360 | a |", "| pgd-strong | 100 | a |"]
    assert blocks[2][2:] == ["| 4 | 2 | 3921 |", "| 8 | 1 | 3921 |"]
    assert blocks[3] == ["8 bits"]
    assert (tmp_path / "runs.csv").read_text() == "run,size,s,rho,other\nc,3920,3.0,20.0,\na,3920,2.0,10.0,\n"
    assert page.read_text().count("Text.") == 4


def write_seeds(folder, name, certified, clean=None, n=100):
    """Write runs of several seeds with the verdicts of atmc verify; `certified` and `clean` count images per seed."""
    for seed, count in enumerate(certified):
        run = folder / f"{name}-seed{seed}"
        if not run.exists():
            write_run(run, seed=seed)
        right = n if clean is None else clean[seed]
        verdicts = ["certified"] * count + ["undecided"] * (right - count) + ["broken"] * (n - right)
        stages = ["interval"] * count + [None] * (right - count) + ["clean"] * (n - right)
        (run / "verify.json").write_text(json.dumps({"verdicts": verdicts, "decided_by": stages}))


SEEDS = """
    [define]
    name = 'split(run, "-seed")[0]'

    [runs]
    sources = ["*/metrics.json"]
    join = { verify = 'f"{run}/verify.json"' }
    group = ["name"]
    baseline = { name = "al0" }
    columns = [
        "name",
        "certified=mean([100 * member.share for member in members]):.1f",
        "deviation=deviation([100 * member.share for member in members]):.2f",
        'against al0=difference(members, baseline, "certified")',
        'clean=difference(members, baseline, "clean")',
    ]
"""


def test_groups_of_seeds_against_a_baseline(tmp_path):
    write_seeds(tmp_path, "al0", [60, 62, 64], clean=[90, 90, 90])
    write_seeds(tmp_path, "atmc", [70, 72, 74], clean=[90, 90, 90])
    for run in tmp_path.iterdir():
        document = json.loads((run / "metrics.json").read_text())
        verdicts = json.loads((run / "verify.json").read_text())["verdicts"]
        (run / "metrics.json").write_text(json.dumps(document | {"share": verdicts.count("certified") / 100}))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "tables.toml").write_text(SEEDS)
    assert call("table", "--page", page) == 0
    al0, atmc = (line.split(" | ") for line in page.read_text().splitlines()[6:8])
    assert al0 == ["| al0", "62.0", "2.00", "–", "– |"]
    assert atmc[:3] == ["| atmc", "72.0", "2.00"]
    assert atmc[3].startswith("+10.00 [+5.")
    assert atmc[4] == "+0.00 [+0.00, +0.00] |"


def evaluation_of(n, **wrong):
    """Return the JSON of an evaluation of n images, with the positions of those that are wrong."""
    attacks = {name: {"n": n} for name in wrong if name != "clean"}
    return {"clean": {"n": n}, "attacks": attacks, "wrong": wrong}


def test_accuracies_under_attack_are_compared_image_by_image():
    better = {"seed": 0, "evaluation": evaluation_of(100, clean=[1], pgd=[1, 2], square=[1, 3])}
    worse = {"seed": 0, "evaluation": evaluation_of(100, clean=[1, 7], pgd=list(range(10)), square=[1, 50])}
    gains = {"clean": 0.01, "pgd": 0.08, "square": 0.0, "worst_case": 0.08}
    for measure, gain in gains.items():
        result = compare_members([better], [worse], measure)
        assert result["difference"] == gain
        assert (result["pairs"], result["n"]) == (1, 100)
    with pytest.raises(ValueError, match=r"unknown measure 'sqare': .* did you mean 'square'"):
        compare_members([better], [worse], "sqare")
    other = worse | {"evaluation": worse["evaluation"] | {"threat": "l2:1"}}
    better["evaluation"]["threat"] = "linf:8/255"
    assert compare_members([better], [other], "clean")
    with pytest.raises(ValueError, match="verdicts for one threat, got l2:1 and linf:8/255"):
        compare_members([better], [other], "pgd")
    with pytest.raises(ValueError, match="expected runs with a seed"):
        compare_members([{"evaluation": better["evaluation"]}], [worse], "pgd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda f: (f / "tables.toml").write_text(SEEDS.replace('"certified")', '"robust")')),
            "no verdicts for 'robust': join the JSON of atmc evaluate",
        ),
        (lambda f: (f / "tables.toml").write_text(SEEDS.replace("{ name = ", "{ nam = ")), "did you mean 'name'"),
        (lambda f: (f / "tables.toml").write_text(SEEDS.replace('= "al0"', '= "alo"')), "no group has the values"),
        (lambda f: (f / "tables.toml").write_text(SEEDS.replace('group = ["name"]', "")), "baseline only beside group"),
        (
            lambda f: (f / "atmc-seed1" / "verify.json").unlink(),
            "seed 1 has no verdicts for .certified.: join the JSON of atmc verify",
        ),
        (lambda f: write_seeds(f, "atmc", [5], n=50), "got 50 and 100 images"),
        (lambda f: write_run(f / "atmc-seed9", seed=1), "one run per seed in every group"),
    ],
)
def test_comparisons_of_seeds_that_make_no_sense(tmp_path, change, sentence):
    write_seeds(tmp_path, "al0", [60, 62])
    write_seeds(tmp_path, "atmc", [70, 72])
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "tables.toml").write_text(SEEDS.replace("member.share", "member.bits"))
    change(tmp_path)
    text = (tmp_path / "tables.toml").read_text().replace("member.share", "member.bits")
    (tmp_path / "tables.toml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        fill_page(page)


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        (
            "[run]\nsources = ['a.json']\ncolumns = ['x']",
            "unknown table of .* 'runs': expected one of run; did you mean 'run'",
        ),
        ("[runs", "is not TOML"),
        ("[runs]\nsource = ['a.json']", "table 'runs': unknown key 'source'.*did you mean 'sources'"),
        ("[runs]\nsources = ['a.json']", "expected sources, and either columns or text"),
        ("[runs]\nsources = ['b.json']\ncolumns = ['x']", "there is no file"),
        ("[runs]\nsources = ['a.json']\ncolumns = ['y']", "table 'runs': unknown column 'y'"),
        ("[runs]\nsources = ['a.json']\nwhere = 'y > 1'\ncolumns = ['x']", "table 'runs': unknown column 'y'"),
    ],
)
def test_page_descriptions_with_errors(tmp_path, toml, sentence):
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "tables.toml").write_text(toml)
    with pytest.raises(ValueError, match=sentence):
        fill_page(tmp_path / "page.md")


def test_page_without_marks_or_description(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n")
    with pytest.raises(ValueError, match="expected tables in"):
        fill_page(page)
    page.write_text(PAGE)
    with pytest.raises(ValueError, match=r"there is no file .*tables\.toml"):
        fill_page(page)


def test_page_takes_a_table_from_another_folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"x": 1}')
    (tmp_path / "results" / "tables.toml").write_text("[few]\nsources = ['a.json']\ncolumns = ['x']\n")
    page = tmp_path / "page.md"
    page.write_text("<!-- table: few of results/tables.toml -->\n<!-- end of table -->\n")
    assert "| x |\n|---|\n| 1 |" in fill_page(page).text
