from __future__ import annotations

import pytest

from vllm_di.components.device.sizes import parse_size, show_size
from vllm_di.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (1073741824, 2**30),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 2GB ", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("0.5KiB", 512),
        ("3TiB", 3 * 2**40),
        ("7B", 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lots",
        "GiB",
        "-1",
        -1,
        0,
        "0GiB",
        "0.2B",
        "1e9",
        "nan",
        "2 XB",
        "9" * 400,
        "8GiBs",
        True,
    ],
)
def test_what_is_no_size_is_named_with_its_key(text: str | int) -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory") as caught:
        parse_size(text, "kv_cache_memory")
    assert repr(text) in str(caught.value)


def test_sizes_are_shown_in_the_largest_unit() -> None:
    assert show_size(12) == "12 B"
    assert show_size(3 * 2**29) == "1.50 GiB"
    assert show_size(2048) == "2.00 KiB"
    assert parse_size(show_size(5 * 2**40)) == 5 * 2**40
