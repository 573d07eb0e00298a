"""``fastckpt ls | show | verify | restore`` as an operator meets them: output, JSON, exit codes, refusals. What holds
for every command is tested for ``diff`` too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

import fastckpt
from fastckpt import errors
from fastckpt.cli.main import commands, exit_code
from fastckpt.cli.terminal import printable, size_text

FASTCKPT = str(Path(sys.executable).parent / "fastckpt")
EVIL = "a\x1b[31m\u202eb\n"


def run(*args: object, **settings: Any) -> Result:
    return CliRunner().invoke(commands, [str(arg) for arg in args], **settings)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(result: Result, kind: str) -> list[dict[str, Any]]:
    messages = [json.loads(line) for line in result.stdout.splitlines()]
    return [message for message in messages if message.pop("message_type") == kind]


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    model = nn.Linear(64, 64)
    return {"model": model, "extra": torch.arange(7), "epoch": step, "schedule": {"lr": 0.5, "names": ["a", "b"]}}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2, 1 again."""
    path = tmp_path_factory.mktemp("cli") / "repository"
    for step in (1, 2, 1):
        with fastckpt.Checkpointer(str(path), options=fastckpt.Options(chunk_bytes=4096)) as checkpointer:
            checkpointer.save(step, state(step), metrics={"loss": 2.5}, note="first note" if step == 2 else EVIL)
    return path


@pytest.fixture
def repo(template: Path, tmp_path: Path) -> Path:
    """A copy, to harm."""
    subprocess.run(["cp", "-r", str(template), str(tmp_path / "repository")], check=True)
    return tmp_path / "repository"


def flip(file: Path, at: int = 20) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def snapshots(repo: Path) -> list[fastckpt.Snapshot]:
    return fastckpt.open(str(repo)).snapshots()


# --- ls ------------------------------------------------------------------------------------------------------------


def test_ls_shows_a_row_for_each_snapshot_and_its_state(template: Path) -> None:
    result = run("ls", template)
    assert result.exit_code == 0
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["step", "created", "size", "state", "note"]
    assert [row.split()[0] for row in rows] == ["1", "2", "1"]
    assert "superseded" in rows[0]
    assert "first note" in rows[1]
    assert "loss=2.5" in rows[1]
    assert "latest" in rows[2]
    assert snapshots(template)[2].created in rows[2]


def test_ls_long_has_new_bytes_and_ranks(template: Path) -> None:
    head, *rows = run("ls", "-l", template).stdout.splitlines()
    assert head.split() == ["step", "created", "size", "new", "ranks", "state", "note"]
    listed = document(run("ls", template, "--json", "--long"))["snapshots"]
    for row, found in zip(listed, snapshots(template), strict=True):
        assert row["new_bytes"] == found.index.stored_bytes
        assert row["ranks"] == 1
        assert row["bytes"] == found.bytes
        assert row["note"] == found.note
    assert size_text(listed[0]["new_bytes"]) in rows[0]


def test_ls_cuts_long_notes_and_many_metrics_and_show_has_them_whole(tmp_path: Path) -> None:
    metrics = {f"layers.{number:02}.gradient_norm": number / 3 for number in range(64)}
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        checkpointer.save(1, {"t": torch.zeros(3)}, metrics=metrics, note="pre-anneal " + "x" * 4000)
    row = run("ls", tmp_path / "r").stdout.splitlines()[1]
    assert "layers.03.gradient_norm=1 (and 60 more) pre-anneal xxx" in row
    assert row.endswith("x...")
    assert len(row) < 300
    assert document(run("ls", tmp_path / "r", "--json"))["snapshots"][0]["metrics"] == metrics
    shown = run("show", tmp_path / "r").stdout
    assert "layers.63.gradient_norm=21\n" in shown
    assert "x" * 4000 in shown


def test_a_metric_that_is_no_finite_number_is_refused_and_the_save_after_it_goes_on(tmp_path: Path) -> None:
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        for number in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="finite"):
                checkpointer.save(1, {"t": torch.zeros(3)}, metrics={"loss": number})
        checkpointer.save(1, {"t": torch.zeros(3)}, metrics={"loss": 1.0}).wait()
    assert "loss=1" in run("ls", tmp_path / "r").stdout


def test_control_characters_from_the_repository_never_reach_the_terminal(template: Path) -> None:
    for result in (
        run("ls", template),
        run("show", template),
        run("show", template, "--environment"),
        run("diff", template, 1, 2),
        run("ls", template, "--json"),
    ):
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "\u202e" not in result.output
    assert r"a\x1b[31m\u202eb\n" in run("ls", template).stdout


def test_a_damaged_index_does_not_hide_the_other_snapshots(repo: Path) -> None:
    flip(repo / f"attempts/{snapshots(repo)[1].attempt}/index")
    result = run("ls", "--long", repo)
    assert result.exit_code == 14
    rows = result.stdout.splitlines()[1:]
    assert ["damaged" in row for row in rows] == [False, True, False]
    assert "index" in result.stderr
    assert run("ls", "--long", "--json", repo).exit_code == 14
    # Without --long it is not read at all.
    assert run("ls", repo).exit_code == 0


def test_the_repository_may_come_from_the_environment(template: Path) -> None:
    expected = run("ls", template).stdout
    assert run("ls", env={"FASTCKPT_REPOSITORY": str(template)}).stdout == expected
    assert run("ls", template, env={"FASTCKPT_REPOSITORY": "/nowhere"}).stdout == expected
    missing = run("ls", env={"FASTCKPT_REPOSITORY": None})
    assert missing.exit_code == 2
    assert "REPO" in missing.stderr


def test_common_options_may_stand_before_or_after_the_command(template: Path) -> None:
    assert document(run("--json", "ls", template)) == document(run("ls", template, "--json"))


# --- show ----------------------------------------------------------------------------------------------------------


def test_show_has_keys_values_and_environment(template: Path) -> None:
    shown = document(run("show", template, "--step", 2, "--values", "--json"))
    keys = {key["key"]: key for key in shown["keys"]}
    assert keys["model.weight"] == {
        "key": "model.weight",
        "dtype": "float32",
        "shape": [64, 64],
        "bytes": 16384,
        "shards": 1,
        "tied_to": None,
    }
    assert set(keys) == {"extra", "model.bias", "model.weight"}
    values = {entry["name"]: entry for entry in shown["values"]}
    assert values["epoch"]["content"] == "2"
    assert values["schedule"]["content"] == "{'lr': 0.5, 'names': ['a', 'b']}"
    assert values["epoch"]["ranks"] == [0]
    assert shown["step"] == 2
    assert shown["environment"]["torch"]
    plain = run("show", template, "--step", "latest").stdout
    assert "model.weight" in plain
    assert "[64, 64]" in plain
    assert "step         1\n" in plain
    (line,) = (line for line in plain.splitlines() if line.startswith("environment "))
    assert f"torch {torch.__version__}, Python" in line
    assert "--environment" in line


def test_show_environment_has_every_fact_of_the_record_by_dotted_name_and_reads_no_layout(repo: Path) -> None:
    record = snapshots(repo)[-1].environment
    for layout in (repo / "layouts").iterdir():
        layout.unlink()
    shown = document(run("show", repo, "--environment", "--json"))
    assert shown["complete"]
    facts = shown["facts"]
    assert facts["torch.version"] == torch.__version__
    assert facts["determinism.threads"] == record["determinism"]["threads"]
    assert facts["ranks_per_node"] == [1]
    names = {f"{name}.{inner}" for name, item in record.items() if isinstance(item, dict) for inner in item}
    assert set(facts) == names | {name for name, item in record.items() if not isinstance(item, dict)}
    lines = run("show", repo, "--environment").stdout.splitlines()
    assert [line.split()[0] for line in lines if line] == ["repository", "step", "created", *facts]
    assert ["torch.version", torch.__version__] in [line.split() for line in lines]
    dotted = ["." in name for name in facts]
    assert dotted == sorted(dotted), "facts that stand alone come first"
    both = run("show", repo, "--environment", "--values")
    assert both.exit_code == 2


def test_show_without_values_decodes_none(template: Path) -> None:
    shown = document(run("show", template, "--json"))
    assert all("content" not in entry for entry in shown["values"])


# --- verify --------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_repository_is_quiet_and_ok(template: Path) -> None:
    result = run("verify", template, "--all")
    assert (result.exit_code, result.stdout) == (0, "3 snapshots checked: no damage\n")
    (summary,) = lines(run("verify", template, "--json"), "summary")
    assert (summary["steps"], summary["damage"], summary["strays"]) == ([1], 0, [])


def test_verify_names_all_damage_by_key_object_and_offset(repo: Path) -> None:
    newest = snapshots(repo)[-1]
    packs = sorted((repo / "packs" / newest.attempt).rglob("*.pack"))
    for pack in packs:
        flip(pack, 0)
    result = run("verify", repo, "--json")
    assert result.exit_code == 14
    damage = lines(result, "damage")
    assert {entry["object"] for entry in damage} == {str(pack.relative_to(repo)) for pack in packs}
    assert all(entry["step"] == 1 and entry["key"] and entry["shard"] and entry["offset"] == 0 for entry in damage)
    human = run("verify", repo)
    assert human.exit_code == 14
    for entry in damage:
        assert f"{entry['key']} {entry['shard']}" in human.stdout
        assert entry["object"] in human.stdout
    # The snapshot of another step is whole.
    assert run("verify", repo, "--step", 2).exit_code == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
@pytest.mark.parametrize(
    "pattern", ["packs/{}/00/0-0.pack", "attempts/{}/part-000000", "attempts/{}/index", "layouts/*", "decisions/*2"]
)
def test_any_harm_to_any_object_exits_with_14_and_names_it(repo: Path, pattern: str, harm: str) -> None:
    (file,) = repo.glob(pattern.format(snapshots(repo)[-1].attempt))
    if harm == "flip":
        flip(file, 0)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    result = run("verify", repo)
    assert result.exit_code == 14
    assert str(file.relative_to(repo)) in result.stdout


def test_a_damaged_format_object_is_damage_and_not_a_missing_repository(repo: Path) -> None:
    flip(repo / "FORMAT")
    result = run("verify", repo)
    assert result.exit_code == 14
    assert "FORMAT" in result.stdout
    assert run("ls", repo).exit_code == 14
    (repo / "FORMAT").unlink()
    assert run("verify", repo).exit_code == 10


def test_a_newer_format_is_incompatible_and_not_damaged(repo: Path) -> None:
    from fastckpt.format import document as documents

    header = json.loads((repo / "FORMAT").read_bytes().splitlines()[0])
    (repo / "FORMAT").write_bytes(documents.seal({**header, "version": 99}))
    result = run("verify", repo)
    assert result.exit_code == 15
    assert "99" in result.stderr


def test_strays_are_a_note_and_no_damage(repo: Path) -> None:
    (repo / "notes.txt").write_text("hello")
    result = run("verify", repo)
    assert result.exit_code == 0
    assert "notes.txt" in result.stderr
    assert "notes.txt" not in run("verify", repo, "-q").output


# --- restore -------------------------------------------------------------------------------------------------------


def test_restore_writes_a_file_that_safetensors_reads(template: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    result = run("restore", template, "--step", 2, "--to", target, "--only", "model.*", "--strip", "model.")
    assert result.exit_code == 0, result.output
    loaded = load_file(target)
    expected = state(2)["model"].state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert "2 plain values left out" in result.stderr


def test_restore_dry_run_writes_nothing(template: Path, tmp_path: Path) -> None:
    before = sorted(template.rglob("*"))
    result = run("restore", template, "--to", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "would write 3 tensors" in result.stdout
    assert "model.weight" in result.stdout
    assert str(tmp_path / "out") in result.stdout
    (summary,) = lines(run("restore", template, "--to", tmp_path / "out", "-n", "--json"), "summary")
    assert summary["dry_run"] is True
    assert sorted(summary["keys"]) == ["extra", "model.bias", "model.weight"]
    assert list(tmp_path.iterdir()) == []
    assert sorted(template.rglob("*")) == before


def test_restore_refuses_to_overwrite(template: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("precious")
    result = run("restore", template, "--to", target)
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert target.read_text() == "precious"
    assert run("restore", template, "--to", target, "--force").exit_code == 0
    assert load_file(target)


def test_restore_of_damage_exits_with_14_and_leaves_no_file(repo: Path, tmp_path: Path) -> None:
    flip(next((repo / "packs" / snapshots(repo)[-1].attempt).rglob("*.pack")), 0)
    result = run("restore", repo, "--to", tmp_path / "out")
    assert result.exit_code == 14
    assert result.stderr.count("\n") <= 2
    assert "Traceback" not in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]


def test_restore_of_keys_that_are_not_there_is_a_usage_error(template: Path, tmp_path: Path) -> None:
    result = run("restore", template, "--to", tmp_path / "out", "--only", "nothing.*")
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RepositoryNotFound("x"), 10),
        (errors.AnotherWriter("x"), 11),
        (errors.SnapshotNotFound("x"), 13),
        (errors.SnapshotDamaged("x"), 14),
        (errors.FormatError("x"), 14),
        (errors.LimitExceeded("x"), 14),
        (errors.UnsupportedVersion("x"), 15),
        (errors.StateMismatch("x"), 15),
        (errors.OutOfSpace("x"), 16),
        (OSError(28, "No space left on device"), 16),
        (errors.StorageError("x"), 1),
        (RuntimeError("x"), 1),
        (click.UsageError("x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["ls", "{tmp}/nowhere"], 10, "not a fastckpt repository"),
        (["verify", "{tmp}"], 10, "not a fastckpt repository"),
        (["show", "{repo}", "--step", "77"], 13, "no snapshot of step 77"),
        (["verify", "{repo}", "--step", "77"], 13, "no snapshot of step 77"),
        (["diff", "{repo}", "1", "77"], 13, "no snapshot of step 77"),
        (["diff", "{repo}", "1", "new"], 2, "step number"),
        (["restore", "{repo}", "--step", "77", "--to", "{tmp}/x"], 13, "no snapshot of step 77"),
        (["show", "{repo}", "--step", "-1"], 2, "step number"),
        (["verify", "{repo}", "--all", "--step", "1"], 2, "exclude"),
        (["ls", "s3://user:secret@bucket"], 2, "no store for"),
        (["nonsense"], 2, "nonsense"),
        (["ls", "{repo}", "--nonsense"], 2, "--nonsense"),
    ],
)
def test_an_error_is_one_line_and_with_json_a_last_line_of_json(
    template: Path, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    args = [arg.format(repo=template, tmp=tmp_path) for arg in args]
    result = run(*args)
    assert result.exit_code == code
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith("fastckpt: ")
    assert words in first
    assert len(rest) <= (1 if code == 2 else 0)
    assert "secret" not in result.output
    answer = json.loads(run(*args, "--json").stderr.splitlines()[-1])
    assert answer["message_type"] == "exit_error"
    assert answer["code"] == code
    assert words in answer["message"]


def test_tracebacks_come_only_when_asked_for(tmp_path: Path) -> None:
    assert "Traceback" not in run("ls", tmp_path, "-v").output
    assert "Traceback" in run("ls", tmp_path, "-vv").stderr


# --- as a process --------------------------------------------------------------------------------------------------


def process(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FASTCKPT, *map(str, args)], capture_output=True, text=True, **settings)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["ls"],
        ["show"],
        ["show", "--environment"],
        ["diff", "1", "2"],
        ["verify"],
        ["restore", "--to", "{tmp}/x"],
    ],
)
def test_no_command_but_import_loads_torch_or_rich(template: Path, tmp_path: Path, args: list[str]) -> None:
    code = (
        "import sys; from fastckpt.cli.main import commands\n"
        "try: commands()\n"
        "finally: print([m for m in ('torch', 'rich', 'ml_dtypes') if m in sys.modules], file=sys.stderr)"
    )
    args = [arg.format(tmp=tmp_path) for arg in args]
    environment = {"FASTCKPT_REPOSITORY": str(template)}
    result = subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] in ("[]", "['ml_dtypes']")


def test_help_loads_nothing_that_a_command_needs() -> None:
    code = (
        "import sys; from fastckpt.cli.main import commands\n"
        "try: commands(['--help'])\n"
        "finally: print([m for m in ('numpy', 'msgspec', 'blake3') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_error_message(template: Path) -> None:
    with subprocess.Popen([FASTCKPT, "show", template], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""


def test_names_that_the_output_cannot_encode_are_escaped(tmp_path: Path) -> None:
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        checkpointer.save(1, {"ключ": torch.zeros(3)})
    result = process("show", tmp_path / "r", env={"PYTHONIOENCODING": "latin-1"})
    assert result.returncode == 0
    assert r"\u043a\u043b\u044e\u0447" in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_removes_the_unfinished_file(template: Path, tmp_path: Path, number: int, code: int) -> None:
    """The restore is held up in the middle of its work by a store that does not answer."""
    script = (
        "import sys, time; from fastckpt.cli import main\n"
        "from fastckpt.repository import export\n"
        "def stuck(*args):\n"
        "    print('here', flush=True); time.sleep(60)\n"
        "export._write_tensors = stuck\n"
        "main.main()"
    )
    command = [sys.executable, "-c", script, "restore", str(template), "--to", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        assert [entry.name for entry in tmp_path.iterdir()] != []
        child.send_signal(number)
        assert child.wait(timeout=30) == code
    assert list(tmp_path.iterdir()) == []


def test_restore_takes_less_memory_than_the_snapshot_has(tmp_path: Path) -> None:
    """The peak of the resident set of a process that restores much more than its budget."""
    size = 400 * 1024 * 1024
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(size // 4096, 1024)})
    code = (
        "import resource, sys; from fastckpt.cli.main import commands\n"
        "try: commands()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    )
    peaks = []
    for only in ("nothing-but-metadata", "w"):
        args = ["restore", str(tmp_path / "r"), "--to", str(tmp_path / "out"), "--only", only]
        result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        peaks.append(int(result.stderr.splitlines()[-1]))
    assert os.path.getsize(tmp_path / "out") > size
    assert peaks[1] - peaks[0] < size // 3


@pytest.mark.parametrize(
    "args", [["ls"], ["show"], ["diff", "1", "2"], ["verify", "--all"], ["restore", "--to", "{tmp}/out"]]
)
def test_on_a_terminal_tables_and_progress_still_say_the_same(template: Path, tmp_path: Path, args: list[str]) -> None:
    args = [arg.format(tmp=tmp_path) for arg in args]
    ours, theirs = os.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "200", "FASTCKPT_REPOSITORY": str(template)}
    with subprocess.Popen([FASTCKPT, *args], stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # what Linux says at the end
                break
            if not piece:
                break
            output += piece
        assert child.wait() == 0
    os.close(ours)
    text = output.decode()
    words = {
        "ls": r"\u202e",
        "show": "model.weight",
        "diff": "2 changed, 1 the same",
        "verify": "3 snapshots checked",
        "restore": "wrote 3 tensors",
    }
    assert words[args[0]] in text
    assert "\u202e" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_FASTCKPT_COMPLETE" in result.stdout


def test_completion_completes_commands() -> None:
    environment = {"_FASTCKPT_COMPLETE": "bash_complete", "COMP_WORDS": "fastckpt re", "COMP_CWORD": "1"}
    assert "restore" in process(env=environment).stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("fastckpt ")


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 2**50, "5.0 PiB"),
    ],
)
def test_sizes_are_iec(count: int, text: str) -> None:
    assert size_text(count) == text


def test_printable_keeps_words_and_escapes_the_rest() -> None:
    assert printable("größe [0:3] ✓") == "größe [0:3] ✓"
    assert printable("\x1b]0;x\x07\u202e\u2028\ud800") == r"\x1b]0;x\x07\u202e\u2028\ud800"
