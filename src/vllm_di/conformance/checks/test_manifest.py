"""The manifest is valid, its interface version is served, and every claim has a check."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.conformance.capabilities import readers
from vllm_di.conformance.checks.test_cache import KV_DTYPES
from vllm_di.conformance.checks.test_communicator import WORLDS
from vllm_di.conformance.numbers import DTYPES
from vllm_di.conformance.outcomes import NotDeclared, Record
from vllm_di.conformance.subject import Subject
from vllm_di.containers.manifest import Capabilities, is_served, served_versions
from vllm_di.errors import ConfigError


@pytest.mark.parametrize("capability", Capabilities.__struct_fields__)
def test_every_capability_has_a_check(capability: str) -> None:
    assert readers(capability), f"no check reads platform.capabilities.{capability}"


def test_every_declared_value_is_run(subject: Subject) -> None:
    """Values that no check has a case for would be claimed and never tried."""
    known: dict[str, Collection[object]] = {
        "dtypes": DTYPES,
        "kv_dtypes": KV_DTYPES,
        "tensor_parallel": WORLDS,
    }
    for capability, values in known.items():
        untried = [v for v in getattr(subject.declared, capability) if v not in values]
        assert not untried, (
            f"platform.capabilities.{capability}: no check runs {', '.join(map(str, untried))}; "
            f"they run {', '.join(map(str, values))}"
        )


def test_interface_version(subject: Subject, record: Record) -> None:
    version = subject.manifest.interface or INTERFACE_VERSION
    record.figure(port=version, engine=INTERFACE_VERSION)
    assert is_served(version), f"written for {version}; this engine serves {served_versions()}"


def test_the_name_is_the_option(subject: Subject) -> None:
    option = subject.assembly().choices["platform"].option
    assert subject.manifest.name == option


def test_the_level_is_one_that_a_report_shows(subject: Subject, record: Record) -> None:
    """Record a report first, then write its level into the manifest."""
    claimed = subject.assembly().settings["claimed_level"]
    record.figure(shown=subject.manifest.level)
    assert claimed is None, (
        f"the manifest claims {claimed}, but the recorded reports show {subject.manifest.level}: "
        "write that level, or record a report (conform --json) that shows the other"
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+platform.no_such_key=1", "no_such_key"),
        ("+platform.capabilities.dtype=[float32]", "dtype"),
        ("++platform.capabilities.dtypes=[flaot32]", "float32"),
        ("++platform.capabilities.graphs=perhaps", "bool"),
        ("++platform.interface='99.0'", "99.0"),
        ("++platform.level=splendid", "level"),
    ],
)
def test_a_wrong_manifest_is_refused(subject: Subject, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        subject.assembly(override)
    assert words in str(error.value), error.value
    assert "platform" in str(error.value), f"no place: {error.value}"


def test_it_has_the_ops_that_it_claims(subject: Subject) -> None:
    if not subject.declared.ops:
        raise NotDeclared("ops of its own")
    origin = subject.assembly().choices["ops"].origin.chosen_by
    if origin == "command line":
        raise NotDeclared("the op library was chosen on the command line")
    with subject.parts("ops") as container:
        described = container.ops().describe()
    lacking = [
        f"{op} runs on {described[op]}"
        for op in subject.declared.ops
        if described[op].startswith("torch") and "unfused" not in described[op]
    ]
    assert not lacking, f"claimed, but {'; '.join(lacking)}"
