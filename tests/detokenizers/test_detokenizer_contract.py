"""The contract of detokenizers, shown on a toy; and every registered one keeps it, through `tiny()`."""

import pytest
import torch
from torch import nn

from unitok import detokenizers
from unitok.detokenizers.base import Condition, Detokenizer, detokenizer_section, load_detokenizer
from unitok.manifest import Manifest


class Toy(Detokenizer):
    """A linear map from the mean of the vectors, plus noise."""

    takes = frozenset({"vectors"})

    def __init__(self, image_size: int = 8, vector_size: int = 5):
        super().__init__()
        self.image_size = image_size
        self.map = nn.Linear(vector_size, 3 * image_size**2)

    def generate(self, condition, *, seeds, guidance=1.0, steps=None, negative=None):
        noise = torch.stack([torch.rand(3 * self.image_size**2, generator=g) for g in self.generators(seeds)])
        out = self.map(condition.vectors.mean(dim=1))
        if guidance != 1.0 and negative is not None:
            null = self.map(negative.vectors.mean(dim=1))
            out = null + guidance * (out - null)
        return torch.sigmoid(out + noise).view(-1, 3, self.image_size, self.image_size)

    def loss(self, images, condition, step):
        error = (self.map(condition.vectors.mean(dim=1)).view_as(images) - images).square().mean()
        return error, {"error": error.detach()}

    @classmethod
    def tiny(cls):
        return cls()


@pytest.fixture(scope="module", params=[None, *detokenizers.names()])
def detokenizer(request) -> Detokenizer:
    torch.manual_seed(0)
    return (Toy if request.param is None else detokenizers.get(request.param)).tiny().eval()


def condition_for(detokenizer: Detokenizer) -> Condition:
    """Three random images' worth of what it takes; a detokenizer that needs sizes other than these says so itself."""
    if hasattr(detokenizer, "example_condition"):
        return detokenizer.example_condition()
    if "vectors" in detokenizer.takes:
        size = detokenizer.config.get("vector_size", 5)
        return Condition(vectors=torch.randn(3, 4, size, generator=torch.Generator().manual_seed(1)))
    if "texts" in detokenizer.takes:
        return Condition(texts=["a red circle", "two squares", ""])
    return Condition(codes=torch.arange(12).view(3, 4), grid=(2, 2))


def test_generate_gives_images_that_depend_on_their_own_seed_and_condition_only(detokenizer):
    condition, seeds = condition_for(detokenizer), [7, 8, 9]
    images = detokenizer.generate(condition, seeds=seeds)
    assert images.shape == (3, 3, detokenizer.image_size, detokenizer.image_size) and not images.requires_grad
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(detokenizer.generate(condition, seeds=seeds), images)
    alone = detokenizer.generate(condition.rows([1]), seeds=[8])
    torch.testing.assert_close(alone, images[1:2], atol=1e-5, rtol=0)
    assert not torch.equal(detokenizer.generate(condition, seeds=[7, 8, 10])[2], images[2])


def test_saved_and_loaded_it_is_the_same(detokenizer, tmp_path):
    condition = condition_for(detokenizer)
    detokenizer.save_pretrained(tmp_path)
    loaded = load_detokenizer(tmp_path)
    assert type(loaded) is type(detokenizer) and not loaded.training
    assert detokenizer_section(loaded) == detokenizer_section(detokenizer) == Manifest.load(tmp_path).detokenizer
    assert torch.equal(loaded.generate(condition, seeds=[1, 2, 3]), detokenizer.generate(condition, seeds=[1, 2, 3]))


def test_it_trains(detokenizer):
    condition, size = condition_for(detokenizer), detokenizer.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    fresh = type(detokenizer).tiny().train()
    loss, parts = fresh.loss(images, condition, 0)
    loss.backward()
    assert loss.ndim == 0 and all(not v.requires_grad for v in parts.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh.parameters())


def test_bad_input_is_refused(detokenizer):
    condition, taken = condition_for(detokenizer), " or ".join(sorted(detokenizer.takes))
    other = (
        {"codes": torch.zeros(3, 4, dtype=torch.int64)}
        if "codes" not in detokenizer.takes
        else {"texts": ["a"] * 3}
        if "texts" not in detokenizer.takes
        else {}
    )
    with pytest.raises(ValueError, match=f"takes {taken}; the condition has "):
        detokenizer.generate(Condition(**other) if other else Condition(), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="3 images, 2 seeds"):
        detokenizer.generate(condition, seeds=[1, 2])
    with pytest.raises(ValueError, match="guidance"):
        detokenizer.generate(condition, seeds=[1, 2, 3], guidance=float("nan"))
    with pytest.raises(ValueError, match="steps"):
        detokenizer.generate(condition, seeds=[1, 2, 3], steps=0)
    with pytest.raises(ValueError, match="negative condition has 1 images"):
        detokenizer.generate(condition, seeds=[1, 2, 3], guidance=2.0, negative=condition.rows([0]))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(3, 5), "float .B, M, D., got torch.float32 .3, 5."),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "float .B, M, D., got torch.int64"),
        (torch.full((3, 4, 5), float("nan")), "finite"),
    ],
)
def test_bad_vectors_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        Toy.tiny().generate(Condition(vectors=vectors), seeds=[1, 2, 3])


def test_condition():
    condition = Condition(codes=torch.arange(8).view(2, 4), grid=(2, 2), texts=["a", "b"])
    assert len(condition) == 2 and condition.parts() == {"codes", "texts"}
    second = condition.rows(slice(1, 2))
    assert second.texts == ["b"] and second.codes.tolist() == [[4, 5, 6, 7]] and second.grid == (2, 2)
    with pytest.raises(ValueError, match="disagree"):
        len(Condition(texts=["a"], vectors=torch.zeros(2, 1, 1)))
    with pytest.raises(ValueError, match="empty"):
        len(Condition())


def test_what_a_detokenizer_lacks_is_named():
    class Bare(Detokenizer):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare does not define tiny\(\)"):
        Bare.tiny()
    with pytest.raises(NotImplementedError, match=r"Bare does not define loss\(\)"):
        Bare().loss(torch.zeros(1, 3, 8, 8), None, 0)
    with pytest.raises(NotImplementedError, match=r"Bare does not define generate\(\)"):
        Bare().generate(None, seeds=[0])
