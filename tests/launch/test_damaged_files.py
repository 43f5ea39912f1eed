"""Files of a run that somebody else has changed: each is named in one line, and nothing is lost."""

from pathlib import Path

import pytest

from launch import config
from launch.metrics import read_records
from launch.run_state import write_config


@pytest.mark.parametrize("line", [b"[]", b"{}", b"\xff\xfe", b"{", b"7", b"[" * 100000])
def test_a_line_of_metrics_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a record with a step as JSON"):
        read_records(tmp_path)


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2')
    assert read_records(tmp_path) == [{"step": 1}]


def test_a_stored_configuration_that_is_no_text_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    options = config.load([f"--output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    write_config(options, first_step=6)
    assert (tmp_path / "config-until-step-6.yaml").read_bytes() == b"\xff\xfe"
    assert "output_dir" in (tmp_path / "config.yaml").read_text()
