"""The table of attacks: adding one takes its function and one `AttackSpec`; no other code knows attacks by name."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import atmc
from atmc.data import Images
from atmc.evaluation import attacks
from atmc.evaluation.accuracy import robust_accuracy
from atmc.evaluation.attacks import ATTACKS, AttackSpec, Stage, check_attacks, takes_pgd_settings
from atmc.robust.threats import L2, Linf

SOURCE = Path(attacks.__file__).parents[1]


def compared_strings(tree: ast.AST) -> set[str]:
    """Return the string literals in comparisons, in intersections of sets, and in the cases of a match."""
    compares = (ast.Compare, ast.MatchValue)
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, compares) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd))
    ]
    inside = (inner for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Constant))
    return {constant.value for constant in inside if isinstance(constant.value, str)}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_module_compares_names_of_attacks(path):
    assert not compared_strings(ast.parse(path.read_text(encoding="utf-8"))) & ATTACKS.keys()


def test_comparisons_are_seen():
    for text in ('a == "pgd"', 'a in ("x", "pgd")', '{"pgd"} & names', 'match a:\n case "pgd":\n  pass'):
        assert "pgd" in compared_strings(ast.parse(text))
    assert not compared_strings(ast.parse('evaluate(model, "pgd")'))


def invert(setup: attacks.Setup) -> attacks.Built:
    """Build an attack that no other module knows: the negative of the image."""
    return [Stage("invert", lambda x, y, _: 1 - x)], {"eps": setup.threat.eps}


def test_a_new_row_is_all_it_takes(monkeypatch):
    """The new attack is evaluated, used by the checks, reported, and refused for other norms, all by its row."""
    spec = AttackSpec(
        help="the negative of the image", build=invert, norms=("linf",), report=lambda verdicts, stages: {"of": stages}
    )
    monkeypatch.setitem(ATTACKS, "invert", spec)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.ones(25), -torch.ones(25)]))
        model[1].bias.copy_(torch.tensor([-12.5, 12.5]))
    images = Images(
        torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None, None].expand(4, 1, 5, 5), torch.tensor([1, 1, 0, 0])
    )
    near, all_of_them = robust_accuracy(model, images, Linf(0.3), "invert"), Linf(0.7)
    assert near.right.tolist() == [True, False, False, True]  # the others' negatives lie outside the ball
    assert (near.refused, near.to_json()["of"]) == (2, ("invert",))
    report = atmc.evaluate(model, images, threat=all_of_them, attack=["invert", "fgsm"])
    assert report.attacks["invert"].accuracy == 0
    assert any("invert leave 0 of 4" in check.detail for check in report.checks)
    check_attacks(["invert"])
    assert not takes_pgd_settings(["invert"])
    with pytest.raises(ValueError, match="attack 'invert' exists for linf only"):
        robust_accuracy(model, images, L2(0.3), "invert")


def test_the_page_on_evaluation_has_the_table():
    rows = ["| name | norms | what it does |", "|---|---|---|"]
    for name, spec in ATTACKS.items():
        norms = "no ball" if not spec.bounded else ", ".join(spec.norms or ("all",))
        rows.append(f"| `{name}` | {norms} | {spec.help} |")
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert "\n".join(rows) + "\n" in page.read_text(encoding="utf-8")
