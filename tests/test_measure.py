"""The limits on the code: a core that is read in an hour. `python tests/measure_code.py` prints all figures."""

import measure_code as measure
import pytest
from measure_code import CORE, METHOD, ROOT, SKIPPABLE, lines_in

# The core is to have 3,700 lines of 52 bytes. This is where it stands: limits only go down.
CORE_LINES = 3700
CORE_BYTES = 52.0
STARTER_FILES = 15


def test_the_core_is_short():
    assert lines_in(CORE) <= CORE_LINES


def test_the_method_has_at_most_1600_lines():
    assert lines_in(METHOD) <= 1600


def test_the_lines_of_the_core_are_loose():
    assert measure.bytes_per_line(CORE) <= CORE_BYTES
    parallel = measure.parallel_assignments(CORE)
    assert len(parallel) <= 4 * lines_in(CORE) / 1000, parallel


def test_functions_are_short():
    found = measure.functions(CORE + SKIPPABLE)
    assert not [name for name, lines, _ in found if lines > 80]
    assert not [name for name, _, count in found if count > 9]


def test_chains_of_imports_are_short():
    for file in "generate.py", "pipeline.py":
        chain = measure.longest_chain(ROOT / file)
        assert len(chain) <= 7, [str(path.relative_to(ROOT)) for path in chain]
    assert measure.chain_to_the_method() <= 5


def test_a_starter_image_enters_few_files_and_none_of_a_feature_that_it_does_not_use():
    entered = measure.entered_files()
    assert "regional/sampling.py" in entered
    others = [path for path in entered if not path.startswith(measure.NETWORKS)]
    assert len(others) <= STARTER_FILES, others
    skippable = [path for path in others if path.startswith(("extensions/", "runtime/"))]
    assert skippable == ["runtime/choose.py"], skippable


def test_the_figures_are_counted_right(tmp_path, monkeypatch):
    """On a program of two files."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    text = "import b\n\na, c = 1, 2\na, c = c, a\n\n\ndef f(self, x, *, y=1):\n    return x\n"
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "b.py").write_text("def late():\n    from c import d\n")
    (tmp_path / "c.py").write_text("d = 1\n")
    places = ("a.py", "b.py")
    assert lines_in(places) == 8 + 2
    assert measure.bytes_per_line(("c.py",)) == 6
    assert measure.parallel_assignments(places) == ["a.py:3"]
    assert measure.functions(places) == [("a.py:f", 2, 2), ("b.py:late", 2, 0)]
    assert [path.name for path in measure.longest_chain(tmp_path / "a.py")] == ["a.py", "b.py", "c.py"]
    (tmp_path / "c.py").write_text("import a\n")
    measure.tree_of.cache_clear()
    with pytest.raises(ValueError, match="cycle"):
        measure.longest_chain(tmp_path / "a.py")
    measure.tree_of.cache_clear()
