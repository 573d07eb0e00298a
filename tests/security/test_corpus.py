"""Repositories that somebody else wrote to do harm: every front door raises an error of ours or gives the right bytes.
It runs nothing, opens and writes nothing outside, takes no more memory than is declared and proven, and ends soon.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.security.corpus import ATTACKS, Attack

ROOT = Path(__file__).resolve().parent.parent.parent
PROCESSES = 2
Reports = dict[str, dict[str, Any]]


def visit(chosen: list[Attack]) -> Reports:
    result = subprocess.run(
        [sys.executable, "-m", "tests.security.visit", *(attack.name for attack in chosen)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # or each thread reserves address space
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return {report["name"]: report for report in reports}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """What came of the attacks that this run asks for, by name."""
    asked = {item.callspec.params["attack"].name for item in request.session.items if is_visit(item)}
    chosen = [a for a in ATTACKS if a.name in asked and (os.geteuid() == 0 or not a.need_root)]
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as executor:
        shares = [chosen[number::PROCESSES] for number in range(PROCESSES)]
        found = list(executor.map(visit, [share for share in shares if share]))
    return {name: report for share in found for name, report in share.items()}


def is_visit(item: Any) -> bool:
    return getattr(item, "originalname", "") == test_every_front_door_withstands.__name__


def marked(attack: Attack) -> Any:
    marks = [pytest.mark.root] if attack.need_root else []
    return pytest.param(attack, marks=marks, id=attack.name)


@pytest.mark.timeout(1000)  # the first one waits for all
@pytest.mark.parametrize("attack", [marked(attack) for attack in ATTACKS])
def test_every_front_door_withstands(attack: Attack, reports: Reports, request: pytest.FixtureRequest) -> None:
    if attack.need_root:
        request.getfixturevalue("need_root")
    report = reports[attack.name]
    assert not report["violations"], "\n".join(report["violations"])
    if attack.says:
        assert report["error"] == attack.error, report["message"] or "it was read"
        assert re.search(attack.says, report["message"]), report["message"]
    else:
        assert not report["error"], report["message"]
        assert report["opened"] > 10, "nothing was watched"
    codes = attack.verify if isinstance(attack.verify, tuple) else (attack.verify,)
    assert report["exit_codes"]["verify"] in codes


def test_there_are_many_attacks_and_no_two_of_one_name() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 150
