import pytest

from tests.lab import kernels
from tests.lab.errors import LabError


@pytest.fixture(autouse=True)
def no_kernel_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DUENDE_LAB_KERNEL", "DUENDE_LAB_MATRIX"):
        monkeypatch.delenv(name, raising=False)


def test_the_third_kernel_joins_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.names() == ("6.12", "newest")
    monkeypatch.setenv("DUENDE_LAB_MATRIX", "all")
    assert kernels.names() == ("6.12", "newest", "6.18")


def test_an_unknown_matrix_is_refused_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUENDE_LAB_MATRIX", "every")
    with pytest.raises(LabError, match="set it to: all"):
        kernels.names()


def test_the_newest_image_of_a_series_is_no_variant_and_counts_its_numbers() -> None:
    listed = [
        "linux-image-6.18.9+deb13-amd64",
        "linux-image-6.18.15+deb13-amd64",
        "linux-image-6.18.15+deb13-amd64-unsigned",
        "linux-image-6.18.20+deb13-cloud-amd64",
        "linux-image-6.19.1+deb13-amd64",
    ]
    assert kernels.newest_image(listed, "6.18") == "linux-image-6.18.15+deb13-amd64"
    assert kernels.newest_image(listed, "6.17") is None
