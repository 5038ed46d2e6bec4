"""The models that :class:`steploom.testing.FakeEngine` pretends to have."""

from steploom._pretended.model import Model
from steploom._pretended.pictures import ImageModel, VideoModel
from steploom._pretended.text import TextModel

MODELS: dict[str, Model] = {"images": ImageModel(), "videos": VideoModel(), "text": TextModel()}
"""By what they make."""

__all__ = ["MODELS", "Model"]
