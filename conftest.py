"""README.md, docs/*.md and the docstrings of src are executed, each document in a namespace of its own."""

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"])
docstrings = Sybil(parsers=[DocTestParser()], path="src", pattern="*.py")

pytest_collect_file = (pages + docstrings).pytest()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", dest="stigmergy_seed", type=int, metavar="N", help="same as --stigmergy-seed")
