"""placeholder"""
from __future__ import annotations
from pathlib import Path
from typing import Any
def write_report(folder: Path, config: Any, metrics: Any, model: Any, test: Any) -> None:
    (folder / "report.html").write_text("x")
