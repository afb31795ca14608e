"""What `import jaxeff` promises: every room without the extras, nothing heavy, exactly the public rooms."""

import subprocess
import sys

import pytest

import jaxeff

HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "matplotlib",
    "sklearn",
    "rich",
    "ml_collections",
    "PIL",
    "torch",
)


def loaded_by(statement: str) -> list[str]:
    program = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_importing_jaxeff_loads_nothing_heavy():
    assert loaded_by("import jaxeff") == []


@pytest.mark.slow
def test_every_room_imports_without_the_extras():
    already = set(loaded_by("import jax, flax.linen, optax, chex"))  # flax itself brings orbax
    block = f"import sys\nfor name in {HEAVY!r}:\n    if name not in {already!r}: sys.modules[name] = None\n"
    rooms = "import jaxeff\nfor room in jaxeff._ROOMS: getattr(jaxeff, room)\n"
    unblock = f"for name in {HEAVY!r}:\n    if sys.modules.get(name, 1) is None: del sys.modules[name]"
    assert set(loaded_by(block + rooms + unblock)) <= already


def test_rooms_are_attributes_and_anything_else_is_a_clear_error():
    assert jaxeff.ops.conv_general_dilated is not None
    assert set(jaxeff.__all__) <= set(dir(jaxeff))
    with pytest.raises(AttributeError, match="its rooms are: compat, costs, data, dlrm, dynamic, federated"):
        jaxeff.nothing_of_this_name  # noqa: B018
