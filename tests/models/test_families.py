"""Every causal class of transformers is equal or refused by name, as the page says.

``make test-families`` (about five minutes); ``python -m tests.models.families
docs/transformers-models.md`` writes the page anew.
"""

from __future__ import annotations

import pytest
from tests.models import families


@pytest.mark.families
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", sorted({*families.model_types()} - {*families.NOT_TRIED}))
def test_equal_or_refused_by_name(model_type: str) -> None:
    assert families.outcome(model_type) == families.recorded()[model_type]


def test_the_page_has_every_class() -> None:
    assert set(families.recorded()) == set(families.model_types()) - set(families.NOT_TRIED)
