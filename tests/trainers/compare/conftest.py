"""The comparison needs tables and a figure."""

import pytest

pytest.importorskip("sklearn", reason="the tabular extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")
