"""Gangs of ranks that all tests of a session share."""

from collections.abc import Iterator

import pytest

from tests.distributed.gang import Gang


@pytest.fixture(scope="session")
def gangs() -> Iterator[dict[int, Gang]]:
    found = {ranks: Gang(ranks) for ranks in (2, 4)}
    yield found
    for gang in found.values():
        gang.close()


@pytest.fixture(params=[2, 4])
def gang(request: pytest.FixtureRequest, gangs: dict[int, Gang]) -> Gang:
    return gangs[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/distributed" in item.path.as_posix():
            item.add_marker(pytest.mark.distributed)
