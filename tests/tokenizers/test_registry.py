"""The folder is the registry, and plug-ins and module:Class reach it too."""

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from unitok import detokenizers, registry, tokenizers
from unitok.tokenizers.base import ImageTokenizer, load_tokenizer
from unitok.tokenizers.fsq import FSQTokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is searched beside the package's own, as if its files had been added there."""
    monkeypatch.setattr(tokenizers, "__path__", [*tokenizers.__path__, str(tmp_path)])
    yield tmp_path
    for name in [m for m in sys.modules if m.startswith("unitok.tokenizers.") and m.endswith("_for_test")]:
        del sys.modules[name]


ONE = """
    from unitok.tokenizers.base import ImageTokenizer
    from unitok.tokenizers.fsq import FSQTokenizer  # imported, so not of this file

    class Toy(FSQTokenizer):
        pass

    class _Helper(ImageTokenizer):
        pass
"""


def write(folder, name, source):
    (folder / f"{name}.py").write_text(textwrap.dedent(source))


def test_names_are_the_files():
    assert "fsq" in tokenizers.names() and "base" not in tokenizers.names()
    assert tokenizers.get("fsq") is FSQTokenizer and tokenizers.name_of(FSQTokenizer) == "fsq"
    assert isinstance(detokenizers.names(), list) and "base" not in detokenizers.names()
    for name in tokenizers.names():
        assert tokenizers.name_of(tokenizers.get(name)) == name


def test_a_new_file_is_a_new_tokenizer(folder, tmp_path):
    write(folder, "toy_for_test", ONE)
    assert "toy_for_test" in tokenizers.names()
    toy = tokenizers.get("toy_for_test")
    assert toy.__name__ == "Toy"
    toy.tiny().save_pretrained(tmp_path / "saved")
    assert type(load_tokenizer(tmp_path / "saved")) is toy


def test_a_file_with_none_or_two_is_refused(folder):
    write(folder, "none_for_test", "import unitok.tokenizers.base")
    write(folder, "two_for_test", ONE + "\n    class Other(FSQTokenizer):\n        pass\n")
    with pytest.raises(ValueError, match="exactly one public tokenizer class, found none"):
        tokenizers.get("none_for_test")
    with pytest.raises(ValueError, match="exactly one public tokenizer class, found Toy, Other"):
        tokenizers.get("two_for_test")


def test_listing_imports_nothing(folder):
    write(folder, "broken_for_test", "raise RuntimeError('imported')")
    assert "broken_for_test" in tokenizers.names()
    with pytest.raises(RuntimeError, match="imported"):
        tokenizers.get("broken_for_test")
    code = (
        "import sys; from unitok import tokenizers, detokenizers; tokenizers.names(); detokenizers.names(); "
        "print([m for m in ('torch', 'transformers', 'unitok.tokenizers.fsq') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_unknown_names_say_what_is_known():
    with pytest.raises(ValueError, match=r"unknown tokenizer 'fqs' \(did you mean 'fsq'\?\); known: .*fsq"):
        tokenizers.get("fqs")


def test_module_and_class(tmp_path):
    assert tokenizers.get("unitok.tokenizers.fsq:FSQTokenizer") is FSQTokenizer
    with pytest.raises(ValueError, match="no module 'unitok_nowhere'"):
        tokenizers.get("unitok_nowhere:Class")
    with pytest.raises(ValueError, match="no class 'Nothing'"):
        tokenizers.get("unitok.tokenizers.fsq:Nothing")
    with pytest.raises(ValueError, match="not a tokenizer: it must be a subclass of unitok.tokenizers.base"):
        tokenizers.get("collections:OrderedDict")
    assert tokenizers.name_of(Outside) == f"{__name__}:Outside"
    Outside.tiny().save_pretrained(tmp_path)
    sys.modules.setdefault(__name__, sys.modules[Outside.__module__])
    assert type(load_tokenizer(tmp_path)) is Outside


class Outside(FSQTokenizer):
    pass


def test_installed_packages_register(monkeypatch):
    def plugins(*, group):
        assert group == "unitok.tokenizers"
        return [EntryPoint("outside", f"{__name__}:Outside", group), EntryPoint("fsq", f"{__name__}:Outside", group)]

    monkeypatch.setattr(registry, "entry_points", plugins)
    assert "outside" in tokenizers.names() and tokenizers.get("outside") is Outside
    assert tokenizers.name_of(Outside) == "outside"
    with pytest.raises(ValueError, match="two tokenizers are called 'fsq'"):
        tokenizers.get("fsq")


def test_arguments_that_are_no_json_cannot_be_lost_on_saving(tmp_path):
    class Odd(FSQTokenizer):
        def __init__(self, thing=None):
            super().__init__(image_size=8, width=8, min_width=8, levels=(3, 3))

    with pytest.raises(ValueError, match="argument 'thing' is not a JSON value"):
        Odd(thing=object()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_base_is_a_hub_mixin():
    from huggingface_hub import PyTorchModelHubMixin

    assert issubclass(ImageTokenizer, PyTorchModelHubMixin)
