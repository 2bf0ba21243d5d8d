"""The lines that say how far a run is: what is written is what is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddm_flwr.reporting.progress import NodeDone, Progress, RoundBegun, RoundDone, Sampling, parse

counts = st.integers(0, 10**12)
names = st.from_regex(r"(?!\.)[\w.-]{1,64}", fullmatch=True)


@given(
    st.one_of(
        st.builds(RoundBegun, counts, counts, counts),
        st.builds(NodeDone, counts, names, counts, st.sampled_from([0.0, 0.1234, 12.5]), counts),
        st.builds(RoundDone, counts, counts, *[st.sampled_from([0.25, 1e6])] * 2, *[counts] * 4, st.just(1.5)),
        st.builds(Sampling, counts, counts, counts, st.sampled_from(["averaged", "raw"])),
    )
)
def test_a_line_is_read_as_it_was_meant(said: Progress) -> None:
    assert parse(str(said)) == said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "left out: round=1/2 asked=3",
        "round=1/2 asked=3 ",
        "round=1/2 asked=three",
        "round=1 node=a b done=1 loss=0.1 up=5",
        "round=1 node=a done=1 loss=low up=5",
        "waiting for nodes: 1 of 2",
    ],
)
def test_other_lines_say_nothing_of_progress(text: str) -> None:
    assert parse(text) is None


def test_a_loss_that_is_not_a_number_is_read_all_the_same() -> None:
    said = parse(str(RoundDone(1, 2, 0.5, float("nan"), 4, 0, 10, 10, 1.0)))
    assert isinstance(said, RoundDone)
    assert said.eval != said.eval
