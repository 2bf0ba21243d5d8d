"""Lines of a run's files as typed records."""

from __future__ import annotations

from dataclasses import fields

import pytest
from local_grid import config, row, run

from feddm_flwr.reporting.records import RoundRecord, total_bytes


def test_a_record_has_every_figure_that_a_round_writes() -> None:
    (done,) = run(config(num_server_rounds=1))
    figures = done.figures()
    assert {*figures} <= {field.name for field in fields(RoundRecord)}
    record = RoundRecord.from_row(figures)
    assert all(getattr(record, key) == value or value != value for key, value in figures.items())  # NaN is not itself
    assert total_bytes([record, record])["bytes_up"] == 2 * done.bytes_up


def test_lines_of_older_and_newer_versions_are_read() -> None:
    older = {key: value for key, value in row(3, clients_ok=4, train_loss=0.5).items() if not key.startswith("bytes_")}
    record = RoundRecord.from_row({**older, "of-the-future": [1]})
    assert (record.round, record.clients_ok, record.train_loss, record.bytes_up, record.fid) == (3, 4, 0.5, 0, None)
    with pytest.raises(TypeError):
        RoundRecord.from_row({"train_loss": 1.0})
