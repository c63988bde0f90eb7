"""What README.md says: its examples run, its lists are those of the tests, its sizes follow from the format."""

import re

import pytest

from mlx_marlin import codec
from mlx_marlin.lm import commands
from tests.lm import test_architectures as lm_architectures
from tests.support import architectures, architectures_gemma, generic_checkpoints
from tests.support.paths import ROOT
from tests.vlm import test_architectures as vlm_architectures

README = (ROOT / "README.md").read_text()


def test_python_examples(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_commands_exist():
    (ours,) = re.findall(r"`mlx_marlin COMMAND` is mlx-lm's own command \((.*?), \.\.\.\)", README)
    (refused,) = re.findall(r"quantized weights \((.*?)\) refuse EXL3", README, re.DOTALL)
    named = lambda text: re.findall(r"`(\w+)`", text)
    assert set(named(ours)) <= set(commands.names())
    assert tuple(named(refused)) == commands.CONVERTERS


def test_architectures_are_those_of_the_tests():
    vlm_original, vlm_generic, original, generic = (
        set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", item, flags=re.DOTALL)))
        for item in re.findall(r"^- these[^:]*?, in [^:]*? names[^:]*?: (.*?)[;.]$", README, re.MULTILINE | re.DOTALL)
    )
    assert vlm_original == {name.removesuffix("_plain") for name in vlm_architectures.CASES} and vlm_generic == set(
        vlm_architectures.GENERIC
    )
    towers = set(lm_architectures.TOWERS)
    assert original == {*architectures.ARCHITECTURES, architectures_gemma.gemma2.__name__, *towers}
    assert generic == set(generic_checkpoints.CONFIGS) - towers


def stored_bytes(bits: float) -> float:
    """Of Qwen3-30B-A3B: trellis and scales of its linears, a head at 6 bits, the rest in 16 bits."""
    layers, hidden, experts, width, vocab = 48, 2048, 128, 768, 151_936
    attention = [(hidden, 4096), (hidden, 512), (hidden, 512), (4096, hidden)]
    linears = attention + experts * [(hidden, width), (hidden, width), (width, hidden)]
    sizes = [(codec.padded(k), codec.padded(n)) for k, n in linears]
    layer = sum(k * n * bits / 8 + 2 * (k + n) for k, n in sizes) + 2 * (hidden * experts + 2 * hidden + 2 * 128)
    head = hidden * codec.padded(vocab) * 6 / 8 + 2 * (hidden + codec.padded(vocab))
    return layers * layer + head + 2 * (vocab * hidden + hidden)


@pytest.mark.parametrize("bits", (2.5, 3.0, 4.0))
def test_the_computed_sizes(bits):
    cache = 48 * 2 * 4 * 128 * 2 * 8192  # keys and values of 4 heads of 128, in 16 bits
    weights = stored_bytes(bits)
    assert f"| {bits} | {weights / 1e9:.1f} GB | {(weights + cache) / 1e9:.1f} GB |" in README


def test_requirements_agree_with_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert "Python 3.10 to 3.13" in README and 'requires-python = ">=3.10,<3.14"' in pyproject
    assert "Exactly mlx 0.32.4" in README and '"mlx==0.32.4"' in pyproject
