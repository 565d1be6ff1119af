import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxprune as jp


def test_nbytes(params, container):
    tree = container(params)
    assert jp.nbytes(tree) == 4 * sum(x.size for x in jax.tree.leaves(params))
    assert jp.nbytes(jax.eval_shape(lambda: params)) == jp.nbytes(params)
    q = jp.quantize_tree({"w": jnp.ones((64, 32))}, bits=2)
    assert jp.nbytes(q) == 64 * 32 // 4 + 32 * 4
    assert jp.nbytes({"a": None, "b": "text"}) == 0


def test_rows_and_totals(params):
    pruned, _ = jp.prune_tree(params, 0.5)
    report = jp.report(None, params, jp.quantize_tree(pruned, bits=4))
    rows = {row.path: row for row in report.rows}
    assert list(rows) == ["conv/bias", "conv/kernel", "dense/bias", "dense/kernel", "embed"]
    kernel = rows["dense/kernel"]
    assert (kernel.shape, kernel.dtype, kernel.bytes_dense) == ((16, 10), "float32", 640)
    assert kernel.bytes_now == 16 * 5 + 40
    assert kernel.bits == pytest.approx(8 * 120 / 160)
    assert kernel.sparsity >= np.mean(np.asarray(pruned["dense"]["kernel"]) == 0)
    assert report.bytes_dense == jp.nbytes(params)
    assert report.bytes_now == sum(row.bytes_now for row in report.rows)
    assert report.seconds_dense is None


def test_latency_and_text(params):
    fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    report = jp.report(fn, params, jp.quantize_tree(params), jnp.ones((2, 16)))
    assert report.seconds_dense > 0
    assert report.seconds_now > 0
    text = str(report)
    for part in ("dense/kernel", "16×10", "total", "latency", "ratio"):
        assert part in text
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report)
    assert max(map(len, capture.get().splitlines())) <= 80


def test_other_trees_are_refused(params):
    with pytest.raises(ValueError, match="missing 'embed'"):
        jp.report(None, params, {k: v for k, v in params.items() if k != "embed"})
    for shape in ((200, 200), (2,)):
        with pytest.raises(ValueError, match="'embed'"):
            jp.report(None, params, {**params, "embed": jnp.ones(shape)})


def test_plot(tmp_path):
    from jaxprune.reports import plot_accuracy

    file = plot_accuracy(tmp_path / "p.png", ["a", "b"], [10, 100], [0.9, 0.95])
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="same length"):
        plot_accuracy(tmp_path / "p.png", ["a"], [10, 100], [0.9, 0.95])
    with pytest.raises(ValueError, match="nbytes"):
        plot_accuracy(tmp_path / "p.png", ["a"], [0], [0.9])


def test_report_of_a_compacted_model():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    masks = {"a": (jnp.arange(8) < 6)[None], "b": (jnp.arange(8) < 6)[:, None]}
    small_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)))
    found = jp.report(fn, params, small, jnp.ones((1, 4)), compressed_fn=small_fn)
    assert found.sparsity == 0.25
    assert found.bytes_now == 0.75 * found.bytes_dense
    assert found.seconds_now > 0
    assert "4×8→6" in str(found)


def test_picture_of_groups(tmp_path):
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
    masks = {"a": (jnp.arange(8) < 6)[None], "b": (jnp.arange(8) < 6)[:, None]}
    plain = jp.reports.plot_groups(tmp_path / "plain.svg", graph).read_text()
    assert "<!-- 8 -->" in plain
    assert "<!-- a -->" in plain
    assert (
        "<!-- 6/8 -->"
        in jp.reports.plot_groups(tmp_path / "cut.svg", graph, masks=masks).read_text()
    )


def test_smaller_and_slower_is_told(monkeypatch):
    from jaxprune.reports import _table

    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    x = jnp.ones((1, 4))
    masks = {"a": (jnp.arange(8) < 6)[None], "b": (jnp.arange(8) < 6)[:, None]}
    small_fn, small = jp.compact(fn, params, masks, x)

    def clock(dense, now):
        times = {"before": np.array([dense]), "after": np.array([now])}
        monkeypatch.setattr(_table, "in_turns", lambda calls, **how: times)

    clock(1e-2, 1.3e-2)
    with pytest.warns(UserWarning, match=r"smaller is slower.*1\.30x.*latency="):
        found = jp.report(fn, params, small, x, compressed_fn=small_fn)
    assert "1.30x slower" in str(found)
    with pytest.warns(UserWarning, match=r"smaller is slower.*explain"):
        jp.report(fn, params, jp.quantize_tree(params), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dense, now in ((1e-2, 1e-2), (1e-2, 1.05e-2), (1e-5, 3e-5)):  # equal, noise, too short
            clock(dense, now)
            jp.report(fn, params, small, x, compressed_fn=small_fn)


def many(layers=30):
    block = lambda: {
        "attention": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)},
        "a_module_with_a_name_that_is_longer_than_most": {"kernel": jnp.ones((8, 16))},
    }
    return {"encoder": {f"layers_{i}": block() for i in range(layers)}, "head": jnp.ones((8, 32))}


def test_many_leaves_are_grouped_and_the_largest_come_first():
    params = many()
    tree = jp.quantize_tree(params, bits=8)
    found = jp.report(None, params, tree)
    assert len(found.rows) == 91
    names = [line.name for line in found.lines]
    assert names[:2] == ["head", "encoder/layers_0"]  # by block: 31 lines fit, 61 layers would not
    assert names[-1] == "total"
    assert len(names) == 32
    by_layer = jp.report(None, params, tree, by="layer", max_rows=5)
    names = [line.name for line in by_layer.lines]
    assert names[0] == "head"  # the largest
    assert names[5:] == ["56 smaller ones", "total"]
    leaves = jp.report(None, params, tree, by="leaf", max_rows=None)
    assert len(leaves.lines) == 92
    sizes = [int(np.prod([int(n) for n in x.shape.split("×")])) for x in leaves.lines[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    totals = {report.lines[-1] for report in (found, by_layer, leaves)}
    assert len(totals) == 1
    for report in (found, by_layer, leaves):
        assert report.bytes_now == jp.nbytes(tree)
    with pytest.raises(ValueError, match="by: expected one of"):
        jp.report(None, params, tree, by="module")
    with pytest.raises(ValueError, match="max_rows"):
        jp.report(None, params, tree, max_rows=0)


@pytest.mark.parametrize("width", [200, 100, 80])
def test_no_word_is_broken(width):
    params = many(2)
    report = jp.report(None, params, jp.quantize_tree(params), by="leaf")
    console = Console(width=width)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    for word in ("encoder", "layers_0", "attention", "kernel", "8×16", "total", "bias"):
        assert word in text
    for word in ("module_", "longer_", "most"):  # of a name that has no room
        assert word in text
        assert word in str(report)
    assert ("a_module_with_a_name_that_is_longer_than_most" in text) == (width == 200)
    assert all(len(line) <= width for line in text.splitlines())


def test_markdown_and_html():
    params = {"a|b": {"w": jnp.zeros((4, 4)), "<x>": jnp.ones((64, 64))}}
    report = jp.report(None, params, jp.quantize_tree(params, where=".*x.*"))
    lines = report.markdown.splitlines()
    assert lines[0].startswith("| leaf | shape |")
    assert lines[2].startswith("| a\\|b/<x> | 64×64 | f32 |")
    assert lines[4].startswith("| **total** |")
    columns = [line.replace("\\|", "").count("|") for line in lines[:5]]
    assert set(columns) == {9}
    assert "in memory" in lines[-1]
    page = report.html
    assert "<td>a|b/<wbr>&lt;x&gt;</td>" in page
    from xml.etree import ElementTree

    table = ElementTree.fromstring(page.replace("<wbr>", ""))
    assert [len(row) for row in table.iter("tr")] == [8] * 4


def test_memory_and_disk_are_told_apart():
    params = {"w": jnp.ones((16, 16))}
    pruned, _ = jp.prune_tree(params, 0.5)
    assert "files of" in " ".join(str(jp.report(None, params, pruned)).split())
    assert "files of" not in str(jp.report(None, params, params))


def test_zeros_are_counted_once_for_each_shape():
    from jaxprune.reports import _table

    params = {f"l{i}": jnp.ones((8, 8)) for i in range(20)}
    tree = jp.quantize_tree(params, bits=4)
    before = _table._zeros_of_compressed._cache_size()
    found = jp.report(None, params, tree)
    assert _table._zeros_of_compressed._cache_size() <= before + 1
    assert all(row.sparsity == 0 for row in found.rows)
