"""Arguments, printing and the dictionary of a report; XLA's analysis beside it."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxeff import costs

W, X = jnp.ones((4, 6)), jnp.ones((2, 4))


def net(w, x):
    with jax.named_scope("conv[3x3]"):
        return jnp.tanh(x @ w)


@pytest.fixture
def report():
    return costs.analyze(net, W, X)


def test_abstract_and_numpy_arguments_give_the_same_report(report):
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (W, X))
    assert costs.analyze(net, *abstract) == report
    assert costs.analyze(net, np.asarray(W), np.asarray(X)) == report


def test_nothing_is_executed():
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    assert costs.analyze(lambda w, x: x @ w, huge, huge).total.macs == 1 << 60


def test_dictionary_survives_json(report):
    copy = json.loads(json.dumps(report.to_dict()))
    assert copy["convention"] == "paper"
    assert copy["total"]["macs"] == 48
    assert [layer["name"] for layer in copy["layers"]] == ["conv[3x3]", "(inputs)"]
    assert copy["notes"] == []


def test_total_is_the_sum_of_the_rows(report):
    for field in ("macs", "params", "activation_bytes", "residual_bytes", "moved_bytes"):
        assert getattr(report.total, field) == sum(getattr(row, field) for row in report.rows)


def test_plain_text_has_one_line_for_each_row_and_note():
    text = str(costs.analyze(jnp.linalg.cholesky, jnp.eye(3)))
    assert "cholesky" in text.splitlines()[-1]
    assert text.splitlines()[0] == "costs, paper convention"
    assert "1,024" in str(costs.analyze(lambda w, x: x @ w, jnp.ones((8, 8)), jnp.ones((16, 8))))


def test_rich_table_prints_names_as_they_are(report):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=120)
    console.print(report.table())
    assert "conv[3x3]" in console.file.getvalue()
    assert "total" in console.file.getvalue()


def test_table_without_rich_names_the_extra(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r"jaxeff\[train\]"):
        report.table()


def test_unknown_layer_lists_the_layers(report):
    with pytest.raises(ValueError, match=r"'dense'.*conv\[3x3\]"):
        report.layer("dense")


def test_unknown_convention_lists_the_valid_ones():
    with pytest.raises(ValueError, match="paper, xla.*'flops'"):
        costs.analyze(net, W, X, convention="flops")


@pytest.mark.parametrize("position", [2, -1, True, "w"])
def test_params_argnum_must_be_a_position(position):
    with pytest.raises(ValueError, match="params_argnum.*2 arguments"):
        costs.analyze(net, W, X, params_argnum=position)


def test_function_without_arguments_has_no_parameters():
    with pytest.raises(ValueError, match="params_argnum"):
        costs.analyze(lambda: jnp.ones(3) @ jnp.ones(3))
    assert costs.analyze(lambda: jnp.ones(3) @ jnp.ones(3), params_argnum=None).total.macs == 3


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_depth_must_be_a_positive_integer(depth):
    with pytest.raises(ValueError, match="depth"):
        costs.analyze(net, W, X, depth=depth)


@pytest.mark.parametrize(("value", "kind"), [("relu", "str"), (True, "bool"), (object(), "object")])
def test_argument_that_is_not_an_array_is_named(value, kind):
    with pytest.raises(TypeError, match=rf"argument 1\['option'\] is a {kind}.*functools.partial"):
        costs.analyze(lambda w, x: x, W, {"option": value})


@pytest.mark.parametrize("entry", [costs.analyze, costs.compiled])
def test_function_must_be_callable(entry):
    with pytest.raises(TypeError, match="fn must be a function"):
        entry(W, X)


def test_compiled_reads_what_xla_says(report):
    compiled = costs.compiled(net, W, X)
    assert compiled.flops >= 2 * report.total.macs
    assert compiled.argument_bytes == W.nbytes + X.nbytes
    assert compiled.output_bytes == 2 * 6 * 4
    assert json.loads(json.dumps(compiled.to_dict())) == compiled.to_dict()


def test_compiled_takes_abstract_arguments_and_jitted_functions():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (W, X)]
    assert costs.compiled(jax.jit(net), *shapes) == costs.compiled(net, W, X)


def test_compiled_says_none_where_the_backend_is_silent():
    class Silent:
        def lower(self, *args):
            return self

        compile = lower
        cost_analysis = memory_analysis = lambda self: None

        def __call__(self):
            raise AssertionError("must not run")

    compiled = costs.compiled(Silent())
    assert set(compiled.to_dict().values()) == {None}
    assert "-" in compiled.beside(costs.analyze(net, W, X))


def test_both_analyses_print_side_by_side(report):
    text = costs.compiled(net, W, X).beside(report)
    assert text.splitlines()[0].split() == ["jaxpr", "XLA"]
    assert text.splitlines()[1].split()[:2] == ["flops", "96"]
