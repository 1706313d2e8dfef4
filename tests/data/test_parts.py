"""The grammar of parts: what is written is read, and what is none has a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data import parts
from slm_jax.errors import BadExample

times = st.floats(0, 1e6)


@given(start=times, length=st.floats(0.001, 1e5), is_open=st.booleans())
def test_stretches_come_back_exactly(start: float, length: float, is_open: bool):
    end = None if is_open else start + length
    parsed = parts.parse(parts.seconds(start, end))
    assert (parsed.start, parsed.end, dict(parsed.values)) == (start, end, {})
    assert parsed.is_stretch == (start > 0 or end is not None)


@given(row=st.integers(0, 2**40), column=st.text(min_size=1, max_size=12))
def test_values_of_any_text_come_back(row: int, column: str):
    written = f"{parts.parquet_row(row, column)}&{parts.seconds(1.5)}"
    parsed = parts.parse(written)
    assert dict(parsed.values) == {"row": str(row), "column": column}
    assert parsed.start == 1.5
    assert parts.whole_number(parsed.values, "row") == row


def test_an_empty_part_is_the_whole_file():
    assert parts.parse("") == parts.Part({})
    assert not parts.parse("").is_stretch
    assert parts.parse("t=,2.5") == parts.Part({}, 0.0, 2.5)
    assert parts.whole_numbers(parts.parse(parts.byte_range(512, 9)).values, "bytes", 2) == [512, 9]


@pytest.mark.parametrize(
    "part", ["t=a", "t=2,1", "t=1,1", "t=-1,2", "t=nan", "t=0,inf", "t=1&t=2", "bytes=1&bytes=2"]
)
def test_what_is_no_part(part: str):
    with pytest.raises(BadExample) as error:
        parts.parse(part)
    assert error.value.reason == "bad_part"


@pytest.mark.parametrize("value", ["", "1", "1,2,3", "-1,2", "a,b", "1,²"])
def test_what_are_no_two_numbers(value: str):
    with pytest.raises(BadExample, match="bytes="):
        parts.whole_numbers({"bytes": value}, "bytes", 2)
