"""Filters on metadata: what each form means, and that a mistake is one line which names what there is."""

from __future__ import annotations

from typing import Any

import pytest

from ullme.errors import ConfigError
from ullme.filters import Filter

DOCUMENTS: list[dict[str, Any]] = [
    {"language": "en", "year": 2019, "tags": ["api", "guide"], "draft": False, "day": "2019-05-01"},
    {"language": "de", "year": 2021, "tags": ["guide"], "draft": True, "day": "2021-01-31"},
    {"language": "en", "year": 2024.5, "tags": [], "day": "2024-12-01"},
    {},
]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
        ({"language": "en"}, [0, 2]),
        ({"language": ["de", "fr"]}, [1]),
        ({"year": {"min": 2020}}, [1, 2]),
        ({"year": {"min": 2019, "max": 2021}}, [0, 1]),
        ({"year": 2021}, [1]),
        ({"tags": "guide"}, [0, 1]),
        ({"tags": ["api", "no"]}, [0]),
        ({"draft": True}, [1]),
        ({"day": {"max": "2021-01-31"}}, [0, 1]),
        ({"language": "en", "year": {"max": 2020}}, [0]),
        (["language=en"], [0, 2]),
        (["language=de,fr"], [1]),
        (["year=2020..2024.5"], [1, 2]),
        (["year=2021.."], [1, 2]),
        (["year=..2019"], [0]),
        (["draft=false"], [0]),
        (["day=2021-01-01..2021-12-31"], [1]),
        (["language=en", "tags=api"], [0]),
        (['{"year": {"min": 2020}, "language": "de"}'], [1]),
    ],
)
def test_conditions_leave_the_documents_that_are_meant(where: Any, expected: list[int]) -> None:
    assert Filter.of(where).rows(DOCUMENTS).tolist() == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["language"], "expected FIELD=VALUE"),
        (["=en"], "expected FIELD=VALUE"),
        (["{bad"], "it is no JSON"),
        (["year=.."], "expected the least or the most value of 'year'"),
        ({"year": {"from": 3}}, "expected {min: .., max: ..} for 'year'"),
        ({"year": None}, "expected a value, a list of values"),
        ({"year": []}, "expected a value, a list of values"),
        (["yaer=3"], "no document has a field 'yaer'; they have: day, draft, language, tags, year; did you mean 'year'"),
        (["year=new"], "expected a number for 'year', as its documents have (2019), got 'new'"),
        (["draft=maybe"], "expected a truth value for 'draft'"),
    ],
)
def test_a_mistake_is_one_line(where: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Filter.of(where).rows(DOCUMENTS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_of_another_type_do_not_match() -> None:
    mixed: list[dict[str, Any]] = [{"size": 3}, {"size": "large"}, {"size": None}]
    assert Filter.of({"size": {"min": 2}}).rows(mixed[:1]).tolist() == [0]
    assert Filter.of({"size": 3}).rows(mixed).tolist() == [0]
