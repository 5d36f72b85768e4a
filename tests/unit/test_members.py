"""The supervisor of a simulated herd: its processes' logs."""

from pathlib import Path

from orchestrator.cli.members import bound_logs


def test_logs_are_bounded_while_they_are_written(tmp_path: Path) -> None:
    path, small = tmp_path / "agent@n1.log", tmp_path / "beat-1.log"
    small.write_text("little\n")
    with path.open("ab", buffering=0) as process:  # as its process has it open
        process.write(b"first\n" * 300)
        bound_logs(tmp_path, 1_000)
        assert path.read_bytes() == b""
        assert path.with_suffix(".log.old").read_bytes() == b"first\n" * 300
        process.write(b"second\n" * 300)
        assert path.read_bytes() == b"second\n" * 300, "nothing but what was written since"
        bound_logs(tmp_path, 1_000)
        assert path.with_suffix(".log.old").read_bytes() == b"second\n" * 300
    assert small.read_text() == "little\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent@n1.log", "agent@n1.log.old", "beat-1.log"]
